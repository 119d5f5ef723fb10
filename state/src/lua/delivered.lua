-- Moves users' delivered cursors forward, never past the head. Every operation is a step of its own: one that fails answers
-- for itself.
-- KEYS: of each operation its chat (hash)   ARGV: of each operation user, seq
-- Returns of each operation 1, or an error.
local call = redis.pcall

local function deliver(key, field, seq)
  local at = call('HMGET', key, 'seq', field)
  if at.err then return at end
  seq = math.min(seq, tonumber(at[1]) or 0)
  if seq > (tonumber(at[2]) or 0) then
    local done = call('HSET', key, field, string.format('%.0f', seq))
    if type(done) == 'table' then return done end
  end
  return 1
end

local answers = {}
for i, key in ipairs(KEYS) do
  answers[i] = deliver(key, 'd:' .. ARGV[2 * i - 1], tonumber(ARGV[2 * i]))
end
return answers
