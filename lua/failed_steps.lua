-- failed_steps: lists what one bucket's index holds of failed steps, newest first.
--
-- KEYS  1 failed  sorted set  failed steps of the bucket, by the time of the failure
-- ARGV  1 nonce   of this call, echoed
--       2 limit
-- REPLY {"entries", nonce, {member, score, …}}
-- Writes nothing. An entry is a hint until confirm_entry has looked at its record.

-- include record

local entries = redis.pcall("ZREVRANGE", KEYS[1], 0, ARGV[2] - 1, "WITHSCORES")
if entries.err then
  return failed_call(KEYS[1], entries)
end
return { "entries", nonce, entries }
