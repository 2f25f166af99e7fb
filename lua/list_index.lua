-- list_index: lists entries of one bucket's claims or failed index.
--
-- KEYS  1 index   sorted set  claims by the end of their lease, or failed steps by the time of the failure
-- ARGV  1 nonce   of this call, echoed
--       2 limit
--       3 mode    "failed": newest first; of claims, by the end of the lease: "lapsed", or "live"
--       4 member  of the last entry that is known, or ""  list from the beginning
--       5 score   of that entry
-- REPLY {"entries", nonce, {member, score, …}}
-- If the last known entry is gone or has another score, the entries with its score are listed again.
-- Writes nothing. An entry is a hint until confirm_entry has checked its record.

-- include record

local index, limit, mode, member, score = KEYS[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local is_failed = mode == "failed"
local range = is_failed and "ZREVRANGE" or "ZRANGE"

local count = redis.pcall("ZCARD", index)
if type(count) == "table" then
  return failed_call(index, count)
end
local first, stop = 0, count -- ranks, from 0
if not is_failed then
  local lapsed = redis.call("ZCOUNT", index, "-inf", now_ms())
  if mode == "live" then
    first = lapsed
  else
    stop = lapsed
  end
end
if member ~= "" then
  local rank = redis.call(is_failed and "ZREVRANK" or "ZRANK", index, member)
  if rank and redis.call(range, index, rank, rank, "WITHSCORES")[2] == score then
    first = rank + 1
  elseif is_failed then
    first = redis.call("ZCOUNT", index, "(" .. score, "+inf")
  else
    first = math.max(first, redis.call("ZCOUNT", index, "-inf", "(" .. score))
  end
end
stop = math.min(stop, first + limit)
return { "entries", nonce, first < stop and redis.call(range, index, first, stop - 1, "WITHSCORES") or {} }
