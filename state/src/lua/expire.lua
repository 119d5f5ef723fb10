-- Retention by age of some chats of a bucket, in the order of the recency index; behind its end begins its beginning.
-- KEYS: 1 recency (zset). The chats' keys are of the same slot.
-- ARGV: 1 tag of the bucket, 2 time behind which to begin (0: at the beginning), 3 oldest time that may stay, 4 chats to look at
-- Returns the time to go on behind, '' when there is no chat.
local left, before, reached = tonumber(ARGV[4]), tonumber(ARGV[3]), ''
local function look(from, to)
  local found = redis.call('ZRANGEBYSCORE', KEYS[1], from, to, 'WITHSCORES', 'LIMIT', 0, left)
  for i = 1, #found, 2 do
    local chat = ARGV[1] .. ':chat:' .. found[i]
    local row = redis.call('HMGET', chat, 'seq', 'first', 'oldest')
    local at, first = tonumber(row[1]) or 0, tonumber(row[2]) or 1
    if first <= at and (tonumber(row[3]) or 0) < before then
      trim(chat, ARGV[1] .. ':messages:' .. found[i], first, at, 0, before)
    end
    reached = found[i + 1]
  end
  left = left - #found / 2
end
look('(' .. ARGV[2], '+inf')
if left > 0 and ARGV[2] ~= '0' then look('-inf', ARGV[2]) end
return reached
