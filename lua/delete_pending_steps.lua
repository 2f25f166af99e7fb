-- delete_pending_steps: forgets the pending ones among the given steps.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
-- ARGV  1 nonce   of this call, echoed
--       2 step, …
-- REPLY {"gone", nonce, position, …}  of those among the given steps that have no record now, from 0, ascending
-- Writes only when at least one of the steps is pending.

-- include record
-- include run
-- include history

local steps, done = KEYS[1], KEYS[2]
local FIRST = 2

local run, _, refusal = load(steps, done)
if refusal then
  return refusal
end
local reply, pending = { "gone", nonce }, {}
for position = FIRST, #ARGV do
  local line = redis.call("HGET", steps, "s" .. ARGV[position])
  local state = line and parse_state(line)
  if line and not state then
    return unreadable(steps, "s" .. ARGV[position], line)
  end
  if state and state.status == PENDING then
    pending[ARGV[position]] = state
  end
  if not state or state.status == PENDING then
    reply[#reply + 1] = position - FIRST
  end
end
if next(pending) then
  for step, state in pairs(pending) do
    redis.call("HDEL", steps, "s" .. step, "i" .. step, "e" .. step)
    for number = math.max(1, state.attempt - HISTORY), state.attempt do
      redis.call("HDEL", steps, "a" .. number .. ":" .. step)
    end
  end
  renew_expiry(run, steps, done, now_ms())
end
return reply
