-- indexes: the two sorted sets that span the runs of a bucket, claims and failed. Needs record.
--
-- A member is "<bytes in the run id>:<run id><step>". The length distinguishes ("a", "bc") from ("ab", "c").

local MAX_FAILED = 1000 -- the newest entries of each of the 1,024 buckets, to bound the memory

-- The refusal if a key has another type, else nil.
local function check_indexes(...)
  for _, key in ipairs({ ... }) do
    local reply = redis.pcall("ZCARD", key)
    if type(reply) == "table" then
      return failed_call(key, reply)
    end
  end
end

-- Returns the refusal if one of two keys has another type; a key may be nil. For use before the first write.
-- define CHECK_INDEXES(first, second) refusal = check_indexes(first, second) @RETURN_REFUSAL

local function index_failed(failed, member, now)
  redis.call("ZADD", failed, now, member)
  redis.call("ZREMRANGEBYRANK", failed, 0, -MAX_FAILED - 1)
end
