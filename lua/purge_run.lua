-- purge_run: forgets a run whose steps are all over, if nothing has changed since it was summarized.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 failed  sorted set  failed steps of the bucket, by the time of the failure
-- ARGV  1 nonce      made for this call alone; the tombstone keeps it, to tell a re-sent call from a second one
--       2 run        "<bytes in the run id>:<run id>", for the index
--       3 tombstone_ms  how long late writes are refused
--       4 made       steps, as summarized
--       5 completed  likewise
--       6 step, 7 state, …  of each failed step, likewise
-- REPLY {"purged", nonce} | {"changed", nonce}
-- Writes only when it replies "purged" for the first time. The large keys are freed in the background.

-- include record
-- include indexes

local steps, done, failed = KEYS[1], KEYS[2], KEYS[3]
local FIRST = 6
local ENTRIES_DROPPED = 200 -- of the index: what takes little time
local CHUNK = 1000 -- arguments of one redis.call; Lua's stack takes about 8,000

local run, _, refusal = load(steps, done)
if refusal then
  if refusal[1] == "tombstone" then
    return { refusal[3] == nonce and "purged" or "changed", nonce }
  end
  return refusal
end
-- A step that is new or completed since shows in the two counts; each failed one, in its line.
if not run.exists or run.created ~= ARGV[4] or run.completed ~= ARGV[5] then
  return { "changed", nonce }
end
for first = FIRST, #ARGV, 2 * CHUNK do
  local fields = {}
  for position = first, math.min(first + 2 * CHUNK, #ARGV) - 1, 2 do
    fields[#fields + 1] = "s" .. ARGV[position]
  end
  for index, line in ipairs(redis.call("HMGET", steps, unpack(fields))) do
    if line ~= ARGV[first + 2 * index - 1] then
      return { "changed", nonce }
    end
  end
end
refusal = check_indexes(failed)
if refusal then
  return refusal
end

-- The entries of many failed steps are left to whoever reads the index, like those of a run that expired.
for position = FIRST, math.min(#ARGV, FIRST + 2 * ENTRIES_DROPPED), 2 do
  redis.call("ZREM", failed, ARGV[2] .. ARGV[position])
end
redis.call("UNLINK", steps, done)
redis.call("HSET", steps, "r", FORMAT .. "x " .. nonce)
redis.call("PEXPIRE", steps, ARGV[3])
return { "purged", nonce }
