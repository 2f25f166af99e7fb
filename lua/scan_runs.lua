-- scan_runs: finds runs on one page of a server's keys.
--
-- KEYS  1 claims  sorted set  of a bucket on that server: it routes the call, and is not read
-- ARGV  1 nonce    of this call, echoed
--       2 cursor   "0" for the first page, then as replied
--       3 pattern  of the steps keys
--       4 count    of keys to scan for this page, approximately
-- REPLY {"keys", nonce, cursor, {key, …}, now_ms}
-- Writes nothing.

-- include record

local reply = redis.pcall("SCAN", ARGV[2], "MATCH", ARGV[3], "COUNT", ARGV[4])
if reply.err then
  return failed_call(KEYS[1], reply)
end
return { "keys", nonce, tostring(reply[1]), reply[2], now_ms() }
