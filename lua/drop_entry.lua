-- drop_entry: drops an entry of the claims or failed index that stands for no step of its bucket.
--
-- KEYS  1 index   sorted set  claims or failed
-- ARGV  1 nonce   of this call, echoed
--       2 member
-- REPLY {"dropped", nonce} | {"kept", nonce}
-- Writes hints alone: the index. The entry stays if the server rejects the write, as a replica does.

-- include record

local index, member = KEYS[1], ARGV[2]

local reply = redis.pcall("ZREM", index, member)
return { type(reply) == "number" and "dropped" or "kept", nonce }
