-- purge_run: deletes a run whose steps have all ended, if it has not changed since it was summarized.
--
-- KEYS  1 steps, 2 done, 3 failed
-- ARGV  1 nonce      of this call only; the tombstone stores it, so that a re-sent call is recognized
--       2 run        "<bytes in the run id>:<run id>", for the index
--       3 tombstone_ms  how long late writes are rejected
--       4 created    steps created, as summarized
--       5 completed  steps completed, as summarized
--       6 step, 7 state, …  each failed step, as summarized
-- REPLY {"purged", nonce} | {"changed", nonce}
-- Writes only when it first replies "purged". The large keys are freed in the background.

-- include record
-- include indexes
-- include runs
-- include bulk

local steps, done, failed = KEYS[1], KEYS[2], KEYS[3]
local FIRST = 6
local ENTRIES_DROPPED = 200 -- of the index, to bound the time

local run, _, refusal = load_run(steps, done)
if refusal then
  if refusal[1] == "tombstone" then
    return { refusal[3] == nonce and "purged" or "changed", nonce }
  end
  return refusal
end
-- A new or newly completed step changes one of the two counts; a failed step that changes changes its line.
if not run.exists or run.created ~= ARGV[4] or run.completed ~= ARGV[5] then
  return { "changed", nonce }
end
local fields = {}
for position = FIRST, #ARGV, 2 do
  fields[#fields + 1] = "s" .. ARGV[position]
end
for index, line in ipairs(read_fields(steps, fields)) do
  if line ~= ARGV[FIRST + 2 * index - 1] then
    return { "changed", nonce }
  end
end
@CHECK_INDEXES(failed, nil)

-- Further index entries are left to the readers of the index, like those of an expired run.
for position = FIRST, math.min(#ARGV, FIRST + 2 * ENTRIES_DROPPED), 2 do
  redis.call("ZREM", failed, ARGV[2] .. ARGV[position])
end
drop_run(steps)
redis.call("UNLINK", steps, done)
redis.call("HSET", steps, "r", @TOMBSTONE(nonce))
redis.call("PEXPIRE", steps, ARGV[3])
return { "purged", nonce }
