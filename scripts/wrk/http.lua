-- What `scripts/bench http` has wrk call: messages, each with an id of its own, or the newest page of a chat.
-- Arguments behind `--`: send or pull, a number for this run.
local threads, n = 0, 0

function setup(thread)
  thread:set('thread_number', threads)
  threads = threads + 1
end

function init(args)
  mode, run = args[1], args[2]
end

function request()
  n = n + 1
  -- The same thousand chats in both modes, so that what is pulled is there.
  local chat = (n * 7919 + thread_number * 104729) % 1000
  if mode == 'pull' then
    return wrk.format('GET', string.format('/api/pull?Chat=u%d:v%d&Reverse=true', chat, chat))
  end
  local body = string.format(
    '{"Chat":"u%d:v%d","Text":"Hello World, this is message %d of the bench","Sender":"u%d","ClientMsgId":"%s-%d-%d"}',
    chat, chat, n, chat, run, thread_number, n)
  return wrk.format('POST', '/api/send', { ['Content-Type'] = 'application/json' }, body)
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format('per_s %.0f\np50_ms %.2f\np99_ms %.2f\nmax_ms %.2f\nrequests %d\nerrors %d\n',
    summary.requests / (summary.duration / 1e6), latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    latency.max / 1e3, summary.requests, e.connect + e.read + e.write + e.status + e.timeout))
end
