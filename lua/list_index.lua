-- list_index: lists entries of one bucket's claims or failed index, from the beginning or after a position.
--
-- KEYS  1 index   sorted set  claims by the end of their lease, or failed steps by the time of the failure
-- ARGV  1 nonce   of this call, echoed
--       2 limit
--       3 mode    "failed": newest first; of claims, by the end of the lease: "lapsed", or "live"
--       4 score, 5 member  of the position, whose entry may have left the index since; "" and ""  the beginning
-- REPLY {"entries", nonce, {member, score, …}}
-- Writes nothing. An entry is a hint until confirm_entry has checked its record.

-- include record

local index, limit, mode, score, member = KEYS[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local is_reversed = mode == "failed"
local command = is_reversed and "ZREVRANGE" or "ZRANGE"

local size = redis.pcall("ZCARD", index)
if type(size) == "table" then
  return failed_call(index, size)
end
if size == 0 then
  return { "entries", nonce, {} }
end

-- How many entries there are up to a score, or with "(" before it.
local function count_to(bound)
  if is_reversed then
    return redis.call("ZCOUNT", index, bound, "+inf")
  end
  return redis.call("ZCOUNT", index, "-inf", bound)
end

-- Compares bytes, as a sorted set does: the operator depends on the server's locale.
local function is_less(first, second)
  for position = 1, #first do
    local one, other = string.byte(first, position), string.byte(second, position)
    if one ~= other then
      return other and one < other
    end
  end
  return #first < #second
end

-- Of the entries with the score of the position, the rank of the first one after it: a binary search.
local function rank_after_position()
  local from, to = count_to("(" .. score), count_to(score)
  while from < to do
    local middle = math.floor((from + to) / 2)
    local lower, upper = member, redis.call(command, index, middle, middle)[1]
    if is_reversed then
      lower, upper = upper, lower
    end
    if is_less(lower, upper) then
      to = middle
    else
      from = middle + 1
    end
  end
  return from
end

local from, to = 0, size
if mode ~= "failed" then
  local lapsed = count_to(now_ms())
  if mode == "lapsed" then
    to = lapsed
  else
    from = lapsed
  end
end
if score ~= "" then
  from = rank_after_position()
end
to = math.min(from + limit, to)
return { "entries", nonce, from < to and redis.call(command, index, from, to - 1, "WITHSCORES") or {} }
