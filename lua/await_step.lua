-- await_step: reads a step run and, if it is not over yet, leaves a mark that somebody waits for that.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
--       2 step
-- REPLY {"over", nonce, state, input, output, error}
--       {"waiting", nonce, state, input, output, error, last}  behind which entry of the stream to wait
--       {"missing", nonce}
-- Writes hints alone: the mark.

-- include record
-- include reply
-- include wake

local steps, done, step = KEYS[1], KEYS[2], ARGV[2]

local _, state, refusal = load(steps, done, step)
if refusal then
  return refusal
end
if not state then
  return { "missing", nonce }
end
if state.status ~= PENDING and state.status ~= RUNNING then
  return with_record("over", steps, step)
end
if not state.awaited then
  redis.pcall("HSET", steps, "w" .. step, "1")
end
local reply = with_record("waiting", steps, step)
local newest = redis.pcall("XREVRANGE", wake_key(steps), "+", "-", "COUNT", 1)
for index = 3, 6 do
  reply[index] = reply[index] or "" -- a reply ends at the first nil
end
reply[7] = newest[1] and newest[1][1] or "0-0"
return reply
