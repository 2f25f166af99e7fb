-- extend: restarts the lease of a claim from now, and notifies its holder if the run is cancelled. Needs record and run.

-- Changes the state and the run. Returns when the lease ends; nil without a lease.
local function extend(run, state, lease, now)
  local started = state.created + state.started
  unretain(run, state.lease)
  state.lease = lease ~= "" and math.max(0, now + lease - started) or ""
  retain(run, state.lease, started)
  return lease ~= "" and started + state.lease or nil
end

-- The reply to the holder of a claim in a cancelled run, with the progress if the holder does not know it.
local function cancelled_claim(steps, step, line, progress)
  local values = redis.call("HMGET", steps, "i" .. step, "c")
  return { "cancelled", nonce, line, values[1], progress or false, values[2] or "" }
end
