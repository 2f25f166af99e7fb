-- indexes: the two sorted sets that span the runs of a bucket, claims and failed. Needs record.
--
-- A member is "<bytes in the run id>:<run id><step>". The length keeps ("a", "bc") and ("ab", "c") apart.

local FAILED_KEPT = 1000 -- the newest of each bucket, of 1,024: a store that nobody tidies stays bounded

-- What to reply if one of the keys is of another type. To be called before anything is written.
local function check_indexes(...)
  for _, key in ipairs({ ... }) do
    local answer = redis.pcall("ZCARD", key)
    if type(answer) == "table" then
      return failed_call(key, answer)
    end
  end
end

local function index_failed(failed, member, now)
  redis.call("ZADD", failed, now, member)
  redis.call("ZREMRANGEBYRANK", failed, 0, -FAILED_KEPT - 1)
end
