-- expire_run: sets how long after its last write a run expires, or that it never expires.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
--       2 ttl_ms  or ""  the run never expires
-- REPLY {"set", nonce} | {"missing", nonce}
-- Writes only when it replies "set".

-- include record
-- include run
-- include new_run

local steps, done, ttl = KEYS[1], KEYS[2], ARGV[2]
@OPEN_EXISTING_RUN

if ttl == "" then
  run.ttl = nil
  redis.call("PERSIST", steps)
  redis.call("PERSIST", done)
else
  set_ttl(run, ttl)
  -- A run that never expires does not count its live claims: count them now.
  for _, field in ipairs(redis.call("HKEYS", steps)) do
    if string.sub(field, 1, 1) == "s" then
      local line = redis.call("HGET", steps, field)
      local state = parse_state(line)
      if not state then
        return unreadable(steps, field, line)
      end
      if state.status == @RUNNING or state.lease ~= "" then
        retain(run, state.lease, state.created + state.started)
      end
    end
  end
  renew_expiry(run, steps, done, now_ms())
  local bucket = @PLACE(steps)
  drop_entries(bucket, expired_entries(run, steps, bucket))
end
redis.call("HSET", steps, "r", format_run(run))
return { "set", nonce }
