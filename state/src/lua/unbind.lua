-- Removes a route if it is still the one meant.
-- KEYS: 1 route bucket   ARGV: 1 user, 2 connection (8 bytes)
-- Returns 1 if it was there. A connection id names one binding only, so comparing it compares the attempt too.
local row = redis.call('HGET', KEYS[1], ARGV[1])
if not row then return 0 end
local others = {}
for at = 1, #row, 20 do
  if string.sub(row, at + 12, at + 19) ~= ARGV[2] then others[#others + 1] = string.sub(row, at, at + 19) end
end
if #others * 20 == #row then return 0 end
if #others == 0 then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], table.concat(others))
end
return 1
