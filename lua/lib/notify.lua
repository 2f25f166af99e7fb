-- notify: notifies the clients that wait for a step when it has ended. Needs record.
--
-- The stream is the only key that is not in KEYS. It usually does not exist, and while a slot migrates, a server
-- rejects a call whose KEYS name a missing key. It is in the same slot, and its errors are ignored: it is a hint.

local NOTIFY_MS = 60000 -- lifetime of the stream; a waiting client polls much more often

local function stream_of(steps)
  return string.sub(steps, 1, -#"steps" - 1) .. "wake"
end

local function notify(steps, step)
  redis.call("HDEL", steps, "w" .. step)
  redis.pcall("XADD", stream_of(steps), "MAXLEN", "~", 100, "*", "step", step)
  redis.pcall("PEXPIRE", stream_of(steps), NOTIFY_MS)
end
