-- scan_runs: looks for runs in one stretch of a server's keys.
--
-- KEYS  1 claims  sorted set  of a bucket on that server: it says where to send this, and is not read
-- ARGV  1 nonce    of this call, echoed
--       2 cursor   "0" to begin with, then as replied
--       3 pattern  of the steps keys that are wanted
--       4 count    of keys to pass in this stretch, more or less
-- REPLY {"keys", nonce, cursor, {key, …}, keys on the server, now_ms}
-- Writes nothing.

-- include record

local answer = redis.pcall("SCAN", ARGV[2], "MATCH", ARGV[3], "COUNT", ARGV[4])
if answer.err then
  return failed_call(KEYS[1], answer)
end
return { "keys", nonce, tostring(answer[1]), answer[2], redis.call("DBSIZE"), now_ms() }
