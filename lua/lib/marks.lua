-- marks: what remains to be done for a step when its attempt ends. Needs record.
--
-- The mark is the text in w<step>: AWAITED if clients wait for the end, HAS_PROGRESS if p<step> exists. Most steps have
-- none, so the common cases read one field to learn that nothing remains.
--
-- Clients are notified by a stream, the only key that is not in KEYS. It usually does not exist, and while a slot
-- migrates, a server rejects a call whose KEYS name a missing key. It is in the same slot, and its errors are ignored:
-- it is a hint.

local NOTIFY_MS = 60000 -- lifetime of the stream; a waiting client polls much more often

local function stream_of(steps)
  return string.sub(steps, 1, -#"steps" - 1) .. "wake"
end

-- The attempt has ended: clears the mark, and does what it stands for. The next attempt needs the progress, unless the step
-- is completed.
local function settle_mark(steps, step, mark, completed)
  if not mark then
    return
  end
  local awaited = @MARKED(mark, @AWAITED)
  if completed then
    redis.call("HDEL", steps, "w" .. step, "p" .. step)
  elseif awaited and @MARKED(mark, @HAS_PROGRESS) then
    redis.call("HSET", steps, "w" .. step, @HAS_PROGRESS)
  elseif awaited then
    redis.call("HDEL", steps, "w" .. step)
  end
  if awaited then
    redis.pcall("XADD", stream_of(steps), "MAXLEN", "~", 100, "*", "step", step)
    redis.pcall("PEXPIRE", stream_of(steps), NOTIFY_MS)
  end
end
