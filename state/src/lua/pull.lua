-- Messages behind (or before) a cursor, as many as fit.
-- KEYS: 1 chat (hash), 2 messages (stream), 3 history   ARGV: 1 cursor, 2 count, 3 '1': backwards, 4 bytes, 5 who reads
-- Returns {history or '', seq or '', first kept or '', up to where it was another's or '', entries}. Stops behind the message that
-- reaches the bytes: one at least.
local found, bytes, left, backwards = {}, 0, tonumber(ARGV[2]), ARGV[3] == '1'
local at = redis.call('HMGET', KEYS[1], 'seq', 'first', 's:' .. ARGV[5])
local from, lowest = '(' .. ARGV[1] .. '-0', '-'
if backwards then
  if ARGV[1] == '0' then from = '+' end
  if at[3] then lowest = '(' .. at[3] .. '-0' end
elseif at[3] and tonumber(at[3]) > tonumber(ARGV[1]) then
  from = '(' .. at[3] .. '-0'
end
while left > 0 do
  -- In small steps: what does not fit had better not be copied out of the stream.
  local step = math.min(left, 8)
  local entries
  if backwards then
    entries = redis.call('XREVRANGE', KEYS[2], from, lowest, 'COUNT', step)
  else
    entries = redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', step)
  end
  for _, entry in ipairs(entries) do
    found[#found + 1] = entry
    bytes = bytes + #entry[2][8]
    if bytes >= tonumber(ARGV[4]) then break end
  end
  if #entries < step or bytes >= tonumber(ARGV[4]) then break end
  left = left - step
  from = '(' .. entries[#entries][1]
end
return {redis.call('GET', KEYS[3]) or '', at[1] or '', at[2] or '', at[3] or '', found}
