-- The number of a user, with the devices known in the order of their numbers.
-- KEYS: 1 user bucket (hash: name -> "number:device:device:...")
-- ARGV: 1 name, 2 device, 3 number to give if the user is new, 4 devices at most
-- Returns the row, or 'full' when the device is new and there are too many.
local row = redis.call('HGET', KEYS[1], ARGV[1])
if not row then
  row = ARGV[3] .. ':' .. ARGV[2]
  redis.call('HSET', KEYS[1], ARGV[1], row)
  return row
end
local devices = 0
for device in string.gmatch(row, ':([^:]*)') do
  if device == ARGV[2] then return row end
  devices = devices + 1
end
if devices >= tonumber(ARGV[4]) then return 'full' end
row = row .. ':' .. ARGV[2]
redis.call('HSET', KEYS[1], ARGV[1], row)
return row
