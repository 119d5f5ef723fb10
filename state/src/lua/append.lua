-- One message, one atomic step: dedupe, next seq, time, append, recency index.
-- KEYS: 1 chat (hash), 2 ids of (chat, sender, stream) (hash), 3 messages (stream), 4 recency (zset), 5 history
-- ARGV: 1 n, 2 chat, 3 sender, 4 body, 5 crc, 6 refusal code (0: none), 7 seconds to remember the ids,
--       8 ids remembered, 9 history to begin with
-- Returns {'ok', answer} {'again', answer} {'expected', n} {'old', n}; answer: "seq time_us history", or "! code".
local n, window = tonumber(ARGV[1]), tonumber(ARGV[8])
local place = tostring(n % window)
local row = redis.call('HMGET', KEYS[2], 'w', place)
local watermark = tonumber(row[1]) or 0
if n <= watermark then
  if watermark - n >= window then return {'old', string.format('%.0f', watermark + 1)} end
  redis.call('EXPIRE', KEYS[2], ARGV[7])
  return {'again', row[2]}
end
if n ~= watermark + 1 then return {'expected', string.format('%.0f', watermark + 1)} end
local answer
if ARGV[6] ~= '0' then
  answer = '! ' .. ARGV[6]
else
  local history = redis.call('GET', KEYS[5])
  if not history then
    history = ARGV[9]
    redis.call('SET', KEYS[5], history)
  end
  local head = redis.call('HMGET', KEYS[1], 'seq', 'time')
  local seq = string.format('%.0f', (tonumber(head[1]) or 0) + 1)
  local now = redis.call('TIME')
  local time = now[1] * 1000000 + now[2]
  local last = tonumber(head[2]) or 0
  if time <= last then time = last + 1 end
  time = string.format('%.0f', time)
  redis.call('HSET', KEYS[1], 'seq', seq, 'time', time)
  redis.call('XADD', KEYS[3], seq .. '-0', 'sender', ARGV[3], 'time', time, 'crc', ARGV[5], 'body', ARGV[4])
  redis.call('ZADD', KEYS[4], time, ARGV[2])
  answer = seq .. ' ' .. time .. ' ' .. history
end
redis.call('HSET', KEYS[2], 'w', ARGV[1], place, answer)
redis.call('EXPIRE', KEYS[2], ARGV[7])
return {'ok', answer}
