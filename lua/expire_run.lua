-- expire_run: sets how long after its last write a run expires, or that it does not.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
--       2 ttl_ms  or ""  the run does not expire
-- REPLY {"set", nonce} | {"missing", nonce}
-- Writes only when it replies "set".

-- include record
-- include run

local steps, done, ttl = KEYS[1], KEYS[2], ARGV[2]

local run, _, refusal = load(steps, done)
if refusal then
  return refusal
end
if not run.exists then
  return { "missing", nonce }
end

run.ttl = nil
set_ttl(run, ttl)
if run.ttl then
  -- A run that does not expire keeps no account of its live claims: make it now, from the records.
  for _, field in ipairs(redis.call("HKEYS", steps)) do
    if string.sub(field, 1, 1) == "s" then
      local line = redis.call("HGET", steps, field)
      local state = parse_state(line)
      if not state then
        return unreadable(steps, field, line)
      end
      if state.status == RUNNING then
        hold(run, state.lease, state.created + state.started)
      end
    end
  end
  renew_expiry(run, steps, done, now_ms())
else
  redis.call("PERSIST", steps)
  redis.call("PERSIST", done)
end
redis.call("HSET", steps, "r", format_run(run))
return { "set", nonce }
