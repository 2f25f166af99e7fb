-- extend: restarts the lease of a claim from now, and notifies its holder if the run is cancelled. Needs record and run.

-- The moment, as text, at which a lease that begins now ends; nil without a lease.
local function lease_end(lease, now)
  return lease ~= "" and string.format("%d", now + lease) or nil
end

-- Changes the run. `held` is the lease until now, `ends` what `lease_end` returned.
-- Returns the new lease, since the attempt started; and when it ends, or nil without a lease.
local function extend(run, held, created, started, ends)
  local start = created + started
  unretain(run, held)
  if not ends then
    retain(run, "", start)
    return "", nil
  end
  local lease = ends - start
  if lease < 0 then -- the clock was set back
    lease, ends = 0, start
  end
  retain(run, lease, start)
  return lease, ends
end

-- The reply to the holder of a claim in a cancelled run, with the progress if the holder does not know it.
local function cancelled_claim(steps, step, line, progress)
  local values = redis.call("HMGET", steps, "i" .. step, "c")
  return { "cancelled", nonce, line, values[1], progress or false, values[2] or "" }
end
