-- Moves users' delivered cursors forward, never past the head. Every operation is a step of its own.
-- KEYS: of each operation its chat (hash)   ARGV: of each operation user, seq
-- Returns 1, or an error of one of them; the others are done all the same.
local call, answer = redis.pcall, 1

local function deliver(key, field, seq)
  local at = call('HMGET', key, 'seq', field)
  if at.err then return at end
  seq = math.min(seq, tonumber(at[1]) or 0)
  if seq <= (tonumber(at[2]) or 0) then return 1 end
  return call('HSET', key, field, string.format('%.0f', seq))
end

for i, key in ipairs(KEYS) do
  local done = deliver(key, 'd:' .. ARGV[2 * i - 1], tonumber(ARGV[2 * i]))
  if type(done) == 'table' then answer = done end
end
return answer
