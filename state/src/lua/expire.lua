-- Retention by age of some chats of a bucket, in the order of the recency index. A round ends with what was there when it began: a chat
-- that is written to meanwhile goes to the end of the index, and in a busy bucket that end would never be reached.
-- KEYS: 1 recency (zset). The chats' keys are of the same slot.
-- ARGV: 1 tag of the bucket, 2 time behind which to go on (0: a round begins), 3 oldest time that may stay, 4 chats to look at,
--       5 time at which this round began
-- Returns the time to go on behind (0: the next round) and that at which this one began.
local most, before, reached, until_us = tonumber(ARGV[4]), tonumber(ARGV[3]), '0', ARGV[5]
if ARGV[2] == '0' then
  local now = redis.call('TIME')
  until_us = string.format('%.0f', now[1] * 1000000 + now[2])
end
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. ARGV[2], until_us, 'WITHSCORES', 'LIMIT', 0, most)
for i = 1, #found, 2 do
  local chat = ARGV[1] .. ':chat:' .. found[i]
  local row = redis.call('HMGET', chat, 'seq', 'first', 'oldest')
  local at, first = tonumber(row[1]) or 0, tonumber(row[2]) or 1
  if first <= at and (tonumber(row[3]) or 0) < before then
    trim(chat, ARGV[1] .. ':messages:' .. found[i], first, at, 0, before)
  end
  reached = found[i + 1]
end
if #found < 2 * most then reached = '0' end
return {reached, until_us}
