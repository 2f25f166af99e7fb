-- grammar: the stored text lines, as macros. README.md explains each part of a line.
--
-- Each line is defined once. With values as arguments, a macro formats the line; with patterns, it parses it. The
-- loader joins adjacent literals, so a pattern reaches the server as one literal.

-- define FORMAT "1"

-- EXPIRED is also a failure: the lease expired and no attempt was left for a takeover. After a FINAL failure, the step
-- cannot be claimed until retry_step.
-- define PENDING "p"
-- define RUNNING "r"
-- define COMPLETED "c"
-- define FAILED "f"
-- define EXPIRED "x"
-- define FINAL "n"
-- define ANY_STATUS "([" .. @PENDING .. @RUNNING .. @COMPLETED .. @FAILED .. @EXPIRED .. @FINAL .. "])"
-- define IS_FAILURE(letter) (letter == @FAILED or letter == @EXPIRED or letter == @FINAL)

-- The run line. RUN_EXPIRY and RUN_CANCELLED follow where they apply, so that the common cases do not match it.
-- define RUN(created, completed) @FORMAT .. " " .. created .. " " .. completed
-- define RUN_EXPIRY(ttl, unleased, leased, retained_until) " " .. ttl .. " " .. unleased .. " " .. leased
--   .. " " .. retained_until
-- define RUN_CANCELLED " c"
-- define TOMBSTONE(token) @FORMAT .. "x " .. token
-- define READ_RUN "^" .. @RUN("(%d+)", "(%d+)")
-- define READ_RUN_EXPIRY "^" .. @RUN_EXPIRY("(%d+)", "(%d+)", "(%d+)", "(%d+)") .. "$"

-- The state line.
-- define STATE(status, claim, lease, started, ended, created, rest) @FORMAT .. status .. " " .. claim
--   .. " " .. lease .. " " .. started .. " " .. ended .. " " .. created .. " " .. rest
-- define CLAIM(attempt, released, token) attempt .. " " .. released .. " " .. token
-- define REST(position, scheduled_by, owner) position .. " " .. scheduled_by .. " " .. owner
-- define ANY_REST "(" .. @REST("%d+", "%S*", ".*") .. ")"
-- define READ_STATE "^" .. @STATE(@ANY_STATUS, @CLAIM("(%d+)", "(%d*)", "(%S*)"), "(%d*)", "(%d*)", "(%d*)",
--   "(%d+)", @ANY_REST) .. "$"
-- define READ_RUNNING "^" .. @STATE(@RUNNING, "(" .. @CLAIM("%d+", "%d*", "(%S+)") .. ")", "(%d*)", "(%d*)", "",
--   "(%d+)", @ANY_REST) .. "$"
-- define READ_NEVER_CLAIMED "^" .. @STATE(@PENDING, @CLAIM("0", "%d*", "%S*"), "%d*", "%d*", "%d*", "%d+",
--   @REST("%d+", "%S*", ""))
-- define PENDING_LINE(by, now, position) @STATE(@PENDING, @CLAIM("0", "", ""), "", "", "", now,
--   @REST(position, by, ""))
-- define FIRST_CLAIM(token, lease, now, position, owner) @STATE(@RUNNING, @CLAIM("1", "", token), lease, "0", "", now,
--   @REST(position, "", owner))

-- The digits of a number in a line, as in model.py. Whether the position has no more; and whether the numbers that
-- READ_RUNNING matched have no more, false also if attempt and released have more together.
-- define MAX_DIGITS 13
-- define HAS_SHORT_POSITION(rest) (#rest <= @MAX_DIGITS + 2 or string.find(rest, " ", 1, true) <= @MAX_DIGITS + 1)
-- define ARE_SHORT(claim, holder, lease, started, created, rest) (#created <= @MAX_DIGITS
--   and (#claim - #holder + #lease + #started <= @MAX_DIGITS + 2
--   or math.max(#claim - #holder - 2, #lease, #started) <= @MAX_DIGITS) and @HAS_SHORT_POSITION(rest))

-- The mark of a step: a word of these letters. README.md says what each stands for.
-- define AWAITED "w"
-- define HAS_PROGRESS "p"
-- define MARKED(mark, letter) string.find(mark, letter, 1, true)
-- define MARK_ALSO(mark, letter) (mark and (@MARKED(mark, letter) and mark or mark .. letter) or letter)

-- The progress of a step: a line about the checkpoint, then the payload.
-- define PROGRESS(attempt, sender, number) attempt .. " " .. sender .. " " .. number .. "\n"
-- define READ_PROGRESS "^" .. @PROGRESS("(%d+)", "(%S+)", "(%d+)")

-- The clock: milliseconds from the reply to TIME, as text. Formatting a number costs as much as a command; arithmetic
-- on text costs little.
-- define NOW(time) time[1] .. string.sub(#time[2] == 6 and time[2] or string.sub("00000" .. time[2], -6), 1, 3)

-- The duration of an attempt that has lasted for `span` (a local variable), as text; 0 if the server's clock was set back.
-- define DURATION(span) string.format("%d", span > 0 and span or 0)

-- Arguments of one redis.call: Lua's stack has room for about 8,000.
-- define CHUNK 1000
