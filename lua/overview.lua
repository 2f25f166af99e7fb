-- overview: counts the entries of one bucket's indexes, and reads the first of each.
--
-- KEYS  1 claims, 2 failed, 3 runs  the indexes of one bucket
-- ARGV  1 nonce   of this call, echoed
-- REPLY {"overview", nonce, live, lapsed, failed, runs, {member, score}, {member, score}, {member, score}, {newest, skip, 0,
--       {member, ms}, 0}}  four counts; the first lapsed claim, live claim and failed step, each {} if there is none; and the
--       newest run, as list_runs replies: newest is "" if there is no other
-- Writes nothing. An entry is a hint until another script has looked at its record.

-- include record
-- include runs

local claims, failed, runs = KEYS[1], KEYS[2], KEYS[3]
local counts = {}
for index, key in ipairs(KEYS) do
  counts[index] = redis.pcall("ZCARD", key)
  if type(counts[index]) == "table" then
    return failed_call(key, counts[index])
  end
end

local function first(command, key, from, to)
  return redis.call(command, key, from, to, "WITHSCORES", "LIMIT", 0, 1)
end

local lapsed, oldest_claims, live_claims = 0, {}, {}
if counts[1] > 0 then
  local now = now_ms()
  lapsed = redis.call("ZCOUNT", claims, "-inf", now)
  oldest_claims = lapsed > 0 and first("ZRANGEBYSCORE", claims, "-inf", now) or {}
  live_claims = lapsed < counts[1] and first("ZRANGEBYSCORE", claims, "(" .. now, "+inf") or {}
end
local failures = counts[2] > 0 and first("ZREVRANGEBYSCORE", failed, "+inf", "-inf") or {}
local newest = counts[3] > 0 and first("ZREVRANGEBYSCORE", runs, "+inf", "-inf") or {}
local page = { counts[3] > 1 and newest[2] or "", 1, 0, newest[1] and parse_run_member(newest[1]) and newest or {}, 0 }
return { "overview", nonce, counts[1] - lapsed, lapsed, counts[2], counts[3], oldest_claims, live_claims, failures, page }
