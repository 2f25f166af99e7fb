-- list_index: lists entries of one bucket's claims or failed index.
--
-- KEYS  1 index   sorted set  claims by the end of their lease, or failed steps by the time of the failure
-- ARGV  1 nonce   of this call, echoed
--       2 limit
--       3 mode    "failed": newest first; of claims, by the end of the lease: "lapsed", or "live"
-- REPLY {"entries", nonce, {member, score, …}}
-- Writes nothing. An entry is a hint until confirm_entry has checked its record.

-- include record

local index, limit, mode = KEYS[1], ARGV[2], ARGV[3]

local entries
if mode == "failed" then
  entries = redis.pcall("ZREVRANGE", index, 0, limit - 1, "WITHSCORES")
else
  local from, to = "-inf", now_ms()
  if mode == "live" then
    from, to = "(" .. to, "+inf"
  end
  entries = redis.pcall("ZRANGEBYSCORE", index, from, to, "WITHSCORES", "LIMIT", 0, limit)
end
if entries.err then
  return failed_call(index, entries)
end
return { "entries", nonce, entries }
