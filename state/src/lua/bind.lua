-- Binds a device to a connection if the attempt is newer.
-- KEYS: 1 route bucket (hash: user -> entries of 20 bytes: device 4, attempt 8, connection 8, big-endian)
-- ARGV: 1 user, 2 device (4 bytes), 3 attempt (8 bytes), 4 connection (8 bytes), 5 attempt in digits, 6 devices at most
-- Returns {'bound', connection replaced or '', connection evicted or ''} or {'stale', attempt stored}.
local row = redis.call('HGET', KEYS[1], ARGV[1]) or ''
local others, replaced, evicted, mine = {}, '', '', tonumber(ARGV[5])
for at = 1, #row, 20 do
  if string.sub(row, at, at + 3) == ARGV[2] then
    local attempt = struct.unpack('>I8', string.sub(row, at + 4, at + 11))
    local connection = string.sub(row, at + 12, at + 19)
    if attempt > mine or (attempt == mine and connection ~= ARGV[4]) then
      return {'stale', string.format('%.0f', attempt)}
    end
    if connection ~= ARGV[4] then replaced = connection end
  else
    others[#others + 1] = string.sub(row, at, at + 19)
  end
end
if #others >= tonumber(ARGV[6]) then
  local oldest, least = 1, math.huge
  for at, entry in ipairs(others) do
    local attempt = struct.unpack('>I8', string.sub(entry, 5, 12))
    if attempt < least then oldest, least = at, attempt end
  end
  evicted = string.sub(table.remove(others, oldest), 13, 20)
end
others[#others + 1] = ARGV[2] .. ARGV[3] .. ARGV[4]
redis.call('HSET', KEYS[1], ARGV[1], table.concat(others))
return {'bound', replaced, evicted}
