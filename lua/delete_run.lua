-- delete_run: forgets a run, and leaves a tombstone so that a late write cannot bring it back to life.
--
-- KEYS  1 steps   hash        the run's records
--       2 done    sorted set  its completed steps, in order
--       3 claims  sorted set  leased claims of the bucket, by the end of their lease
--       4 failed  sorted set  failed steps of the bucket, by the time of the failure
-- ARGV  1 nonce   made for this call alone; the tombstone keeps it, to tell a re-sent call from a second one
--       2 run     "<bytes in the run id>:<run id>", for the indexes
--       3 tombstone_ms  how long late writes are refused
-- REPLY {"deleted", nonce} | {"missing", nonce}
-- Writes only when it replies "deleted" for the first time. It also deletes what cannot be read: it is the cure
-- for a corrupt or half-evicted run, though never a key of another type.

-- include record
-- include indexes

local steps, done, claims, failed = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local FIELDS_SEARCHED = 1000 -- of the hash: about 300 steps

local _, _, refusal = load(steps, done)
if refusal and (refusal.err or refusal[1] == "wrongtype") then
  return refusal
end
if refusal and refusal[1] == "tombstone" then
  return { refusal[3] == nonce and "deleted" or "missing", nonce }
end
if redis.call("EXISTS", steps, done) == 0 then
  return { "missing", nonce }
end
refusal = check_indexes(claims, failed)
if refusal then
  return refusal
end

-- A long run's entries are left to whoever reads the indexes, like those of a run that expired: to look for them would
-- hold up the server.
if redis.call("HLEN", steps) <= FIELDS_SEARCHED then
  for _, field in ipairs(redis.call("HKEYS", steps)) do
    if string.sub(field, 1, 1) == "s" then
      local state = parse_state(redis.call("HGET", steps, field))
      if not state or state.status ~= COMPLETED then
        local member = ARGV[2] .. string.sub(field, 2)
        redis.call("ZREM", claims, member)
        redis.call("ZREM", failed, member)
      end
    end
  end
end
redis.call("UNLINK", steps, done)
redis.call("HSET", steps, "r", FORMAT .. "x " .. nonce)
redis.call("PEXPIRE", steps, ARGV[3])
return { "deleted", nonce }
