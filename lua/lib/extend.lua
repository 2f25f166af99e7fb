-- extend: restarts the lease of a claim from now. Needs record and run.

-- Changes the state and the run. Returns when the lease ends; nil without a lease.
local function extend(run, state, lease, now)
  local started = state.created + state.started
  unretain(run, state.lease)
  state.lease = lease ~= "" and math.max(0, now + lease - started) or ""
  retain(run, state.lease, started)
  return lease ~= "" and started + state.lease or nil
end
