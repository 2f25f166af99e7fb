-- get_step_run: reads one step's record.
--
-- KEYS  1 steps, 2 done
-- ARGV  1 nonce   of this call, echoed
--       2 step
-- REPLY {"found", nonce, state, input, output, error, progress} | {"missing", nonce}
-- Writes nothing.

-- include record
-- include reply

local steps, done, step = KEYS[1], KEYS[2], ARGV[2]
@OPEN_EXISTING_STEP

return with_record("found", steps, step)
