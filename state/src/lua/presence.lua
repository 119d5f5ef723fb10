-- In front of bind.lua, unbind.lua and retire.lua. Who comes and goes, for the operator's own systems: docs/hooks.md is the contract of the
-- fields. The stream is named only when it is on, and nothing rests on it: what it refuses is passed over.
local function tell(user, online, most)
  if most == '0' then return end
  local number, now = tonumber(user), redis.call('TIME')
  local name = redis.pcall('HGET', string.format('name:%05d', number % 32768), user)
  redis.pcall('XADD', string.format('{p%02d}:presence', number % 64), 'MAXLEN', '~', most, '*', 'type', 'presence',
    'user', type(name) == 'string' and name or '', 'online', online,
    'time_us', string.format('%.0f', now[1] * 1000000 + now[2]))
end
