-- Removes routes that are still the ones meant. A connection id names one binding only, so comparing it compares the
-- attempt too.
-- KEYS: of each operation its route bucket
-- ARGV: 1 events that a stream of who comes and goes keeps (0: there is none); then of each operation user, connection (8 bytes)
-- When the last one of a user goes, the time is kept in a hash of the same slot.
-- Returns 1, or an error of one of them; the others are done all the same.
local call, sub = redis.pcall, string.sub
local now = redis.call('TIME')[1]

local function unbind(key, user, connection)
  local row = call('HGET', key, user)
  if not row then return 1 end
  if type(row) == 'table' then return row end
  -- The mark of a number that is nobody's any more (retire.lua) stays.
  local others, mark = {}, string.rep('-', #row % 20)
  for at = 1 + #mark, #row, 20 do
    if sub(row, at + 12, at + 19) ~= connection then others[#others + 1] = sub(row, at, at + 19) end
  end
  if #mark + #others * 20 == #row then return 1 end
  if #others > 0 then return call('HSET', key, user, mark .. table.concat(others)) end
  -- Of a number that is nobody's, no time is kept.
  local done = mark == '' and call('HDEL', key, user) or call('HSET', key, user, mark)
  if type(done) == 'table' then return done end
  if mark == '' then tell(user, '0', ARGV[1]) end
  return mark == '' and call('HSET', 'seen:{' .. key .. '}', user, now) or 1
end

local answer = 1
for i, key in ipairs(KEYS) do
  local done = unbind(key, ARGV[2 * i], ARGV[2 * i + 1])
  if type(done) == 'table' then answer = done end
end
return answer
