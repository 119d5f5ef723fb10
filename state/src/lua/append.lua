-- One message, one atomic step: dedupe, next seq, time, append, recency index, and what retention takes for it.
-- KEYS: 1 chat (hash), 2 ids of (chat, sender, stream) (hash) or the named id (string), 3 messages (stream), 4 recency (zset), 5 history
-- ARGV: 1 n, or "=" and the digest of the body of a named one, or "-" for one without a name, 2 chat, 3 sender, 4 body, 5 crc, 6 refusal code (0: none), 7 seconds to remember the id at least,
--       8 ids remembered, 9 history to begin with, 10 messages kept (0: all), 11 µs that they are kept (0: for ever),
--       12 seqs between two looks for what is due
-- Returns {'ok', answer} {'again', answer} {'expected', n} {'old', n} {'conflict', ''}; answer: "seq time_us history", or
-- "! code", which uses up a number and not a name.
local function remember(key, seconds)
  -- An hour more than asked for, so that this is written once an hour and not with every message.
  if redis.call('TTL', key) < seconds then redis.call('EXPIRE', key, string.format('%.0f', seconds + 3600)) end
end

local n, place = tonumber(ARGV[1]), nil
if n then
  local window = tonumber(ARGV[8])
  place = tostring(n % window)
  local row = redis.call('HMGET', KEYS[2], 'w', place)
  local watermark = tonumber(row[1]) or 0
  if n <= watermark then
    if watermark - n >= window then return {'old', string.format('%.0f', watermark + 1)} end
    remember(KEYS[2], tonumber(ARGV[7]))
    return {'again', row[2]}
  end
  if n ~= watermark + 1 then return {'expected', string.format('%.0f', watermark + 1)} end
elseif ARGV[1] ~= '-' then
  local known = redis.call('GET', KEYS[2])
  if known then
    local digest, answer = string.match(known, '^(=%x+) (.*)$')
    if digest ~= ARGV[1] then return {'conflict', ''} end
    return {'again', answer}
  end
end
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
  local at = (tonumber(head[1]) or 0) + 1
  local seq = string.format('%.0f', at)
  local now = redis.call('TIME')
  local time = now[1] * 1000000 + now[2]
  local last = tonumber(head[2]) or 0
  if time <= last then time = last + 1 end
  local now_us = time
  time = string.format('%.0f', time)
  -- First what may be refused: a script that fails is not taken back.
  redis.call('XADD', KEYS[3], seq .. '-0', 'sender', ARGV[3], 'time', time, 'crc', ARGV[5], 'body', ARGV[4])
  if at == 1 then
    redis.call('HSET', KEYS[1], 'seq', seq, 'time', time, 'oldest', time)
  else
    redis.call('HSET', KEYS[1], 'seq', seq, 'time', time)
  end
  redis.call('ZADD', KEYS[4], time, ARGV[2])
  -- Rarely, so that most messages pay nothing for it.
  if at % tonumber(ARGV[12]) == 0 then
    local kept = redis.call('HMGET', KEYS[1], 'first', 'oldest')
    local first, most, age = tonumber(kept[1]) or 1, tonumber(ARGV[10]), tonumber(ARGV[11])
    local many = most > 0 and at - first >= most
    local old = age > 0 and (tonumber(kept[2]) or 0) < now_us - age
    if many or old then
      trim(KEYS[1], KEYS[3], first, at, many and at - most + 1 or 0, old and now_us - age or 0)
    end
  end
  answer = seq .. ' ' .. time .. ' ' .. history
end
if n then
  redis.call('HSET', KEYS[2], 'w', ARGV[1], place, answer)
  remember(KEYS[2], tonumber(ARGV[7]))
elseif ARGV[1] ~= '-' and ARGV[6] == '0' then
  redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. answer, 'EX', ARGV[7])
end
return {'ok', answer}
