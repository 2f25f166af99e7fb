-- await_step: reads a step run and, if it has not ended, marks that a client waits for it.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
--       2 step
-- REPLY {"over", nonce, state, input, output, error, progress}
--       {"waiting", nonce, state, input, output, error, progress, last}  last: the id of the stream entry to read after
--       {"missing", nonce}
-- Writes only hints: the mark.

-- include record
-- include reply
-- include marks

local steps, done, step = KEYS[1], KEYS[2], ARGV[2]
@OPEN_EXISTING_STEP

if state.status ~= @PENDING and state.status ~= @RUNNING then
  return with_record("over", steps, step)
end
if not (state.mark and @MARKED(state.mark, @AWAITED)) then
  redis.pcall("HSET", steps, "w" .. step, @MARK_ALSO(state.mark, @AWAITED))
end
local reply = with_record("waiting", steps, step)
local newest = redis.pcall("XREVRANGE", stream_of(steps), "+", "-", "COUNT", 1)
for index = 3, 7 do
  reply[index] = reply[index] or "" -- a reply ends at the first nil
end
reply[8] = newest[1] and newest[1][1] or "0-0"
return reply
