-- live_claims: lists what one bucket's index holds of claims whose lease is not over, soonest over first.
--
-- KEYS  1 claims  sorted set  leased claims of the bucket, by the end of their lease
-- ARGV  1 nonce   of this call, echoed
--       2 limit
-- REPLY {"entries", nonce, {member, score, …}}
-- Writes nothing. An entry is a hint until confirm_entry has looked at its record.

-- include record

local entries = redis.pcall("ZRANGEBYSCORE", KEYS[1], "(" .. now_ms(), "+inf", "WITHSCORES", "LIMIT", 0, ARGV[2])
if entries.err then
  return failed_call(KEYS[1], entries)
end
return { "entries", nonce, entries }
