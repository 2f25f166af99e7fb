-- delete_run: deletes a run, and leaves a tombstone so that a late write cannot recreate it.
--
-- KEYS  1 steps, 2 done, 3 claims, 4 failed
-- ARGV  1 nonce   of this call only; the tombstone stores it, so that a re-sent call is recognized
--       2 run     "<bytes in the run id>:<run id>", for the indexes
--       3 tombstone_ms  how long late writes are rejected
-- REPLY {"deleted", nonce} | {"missing", nonce}
-- Writes only when it first replies "deleted". It also deletes records that cannot be read, to repair a corrupt or
-- partly evicted run, but never a key of another type.

-- include record
-- include indexes
-- include runs

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local FIELDS_SEARCHED = 1000 -- of the hash: about 300 steps

local _, _, refusal = load_run(steps, done)
if refusal and (refusal.err or refusal[1] == "wrongtype") then
  return refusal
end
if refusal and refusal[1] == "tombstone" then
  return { refusal[3] == nonce and "deleted" or "missing", nonce }
end
if redis.call("EXISTS", steps, done) == 0 then
  return { "missing", nonce }
end
@CHECK_INDEXES(claims, failed)

-- The index entries of a long run are left to the readers of the indexes, like those of an expired run: finding them
-- here would block the server.
if redis.call("HLEN", steps) <= FIELDS_SEARCHED then
  for _, field in ipairs(redis.call("HKEYS", steps)) do
    if string.sub(field, 1, 1) == "s" then
      local state = parse_state(redis.call("HGET", steps, field))
      if not state or state.status ~= @COMPLETED then
        local member = ARGV[2] .. string.sub(field, 2)
        redis.call("ZREM", claims, member)
        redis.call("ZREM", failed, member)
      end
    end
  end
end
drop_run(steps)
redis.call("UNLINK", steps, done)
redis.call("HSET", steps, "r", @TOMBSTONE(nonce))
redis.call("PEXPIRE", steps, ARGV[3])
return { "deleted", nonce }
