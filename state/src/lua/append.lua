-- One message, one atomic step: dedupe, next seq, time, append, recency index, and what retention takes for it.
-- KEYS: 1 chat (hash), 2 ids of (chat, sender, stream) (hash) or the named id (string), 3 messages (stream), 4 recency (zset), 5 history
-- ARGV: 1 n, or "=" and the digest of the body of a named one, or "-" for one without a name, 2 chat, 3 sender, 4 body, 5 crc, 6 refusal code (0: none), 7 seconds to remember the id at least,
--       8 ids remembered, 9 history to begin with, 10 messages kept (0: all), 11 µs that they are kept (0: for ever),
--       12 seqs between two looks for what is due, 13 kind (0: text), 14 seq that must be the sender's to edit (0: none),
--       15 events that the bucket's stream of them keeps (0: there is none)
-- In a group also KEYS: 6 members (hash)   ARGV: 16 what changes (0: nothing), and as `change` wants it
-- In a one-to-one chat, if it rests on a token, also KEYS: 6 its user's revocations (hash)   ARGV: 16 when it was issued (s)
-- Returns {'ok', answer} {'again', answer} {'expected', n} {'old', n} {'conflict', ''} {'revoked', ''}; answer: "seq time_us history", in a
-- group with its version behind it, or "! code", which uses up a number and not a name.
local function remember(key, seconds)
  -- An hour more than asked for, so that this is written once an hour and not with every message.
  if redis.call('TTL', key) < seconds then redis.call('EXPIRE', key, string.format('%.0f', seconds + 3600)) end
end

local in_group = string.sub(ARGV[2], 1, 1) == '#'
if KEYS[6] and not in_group and tonumber(ARGV[16]) < tonumber(redis.call('HGET', KEYS[6], '') or '0') then
  return {'revoked', ''}
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
    -- What was said under this name by somebody who was deleted is nobody's.
    local since = tonumber(redis.call('HGET', KEYS[1], 's:' .. ARGV[3]) or '0')
    if (tonumber(string.match(answer, '^%d+')) or 0) > since then
      if digest ~= ARGV[1] then return {'conflict', ''} end
      return {'again', answer}
    end
  end
end
local function remember_answer(answer)
  if n then
    redis.call('HSET', KEYS[2], 'w', ARGV[1], place, answer)
    remember(KEYS[2], tonumber(ARGV[7]))
  elseif ARGV[1] ~= '-' then
    redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. answer, 'EX', ARGV[7])
  end
end
local refusal, version, effect = ARGV[6], '', nil
if refusal == '0' and in_group then refusal, version, effect = change() end
if refusal == '0' and ARGV[14] ~= '0' then refusal = editable() end
local answer
if refusal ~= '0' then
  answer = '! ' .. refusal
  -- It uses up a number and not a name.
  if n then remember_answer(answer) end
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
  if ARGV[13] == '0' then
    redis.call('XADD', KEYS[3], seq .. '-0', 'sender', ARGV[3], 'time', time, 'crc', ARGV[5], 'body', ARGV[4])
  else
    redis.call('XADD', KEYS[3], seq .. '-0', 'sender', ARGV[3], 'time', time, 'crc', ARGV[5], 'body', ARGV[4], 'kind', ARGV[13])
  end
  if effect then
    version = seq
    effect.fields[#effect.fields + 1] = 'gv'
    effect.fields[#effect.fields + 1] = seq
    redis.call('HSET', KEYS[1], unpack(effect.fields))
    for user, row in pairs(effect.rows) do redis.call('HSET', KEYS[6], user, row) end
  end
  if at == 1 then
    redis.call('HSET', KEYS[1], 'seq', seq, 'time', time, 'oldest', time)
  else
    redis.call('HSET', KEYS[1], 'seq', seq, 'time', time)
  end
  answer = seq .. ' ' .. time .. ' ' .. history
  if in_group then answer = answer .. ' ' .. version end
  -- Its id before anything else: whatever fails behind it is asked for again, and stored once.
  remember_answer(answer)
  redis.call('ZADD', KEYS[4], time, ARGV[2])
  -- In the slot of the others, and named only when it is on. docs/hooks.md is the contract of the fields.
  if ARGV[15] ~= '0' then
    redis.call('XADD', string.gsub(KEYS[5], ':history$', ':events'), 'MAXLEN', '~', ARGV[15], '*', 'type', 'message',
      'chat', ARGV[2], 'seq', seq, 'sender', ARGV[3], 'time_us', time, 'kind', ARGV[13], 'body', ARGV[4])
  end
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
end
return {'ok', answer}
