// The C functions of autosteer.h, on the C++ engine. Exceptions become error codes here.
#include "autosteer.h"

#include <exception>
#include <memory>
#include <string>

#include "json.hpp"

struct autosteer_engine {
  std::shared_ptr<const autosteer::Engine> engine;
};

struct autosteer_conversation {
  std::shared_ptr<const autosteer::Engine> engine;
  std::shared_ptr<autosteer::Conversation> conversation;
};

struct autosteer_stream {
  std::shared_ptr<const autosteer::Engine> engine;
  std::shared_ptr<autosteer::Conversation> conversation;  // null: nothing is shared
  autosteer::Stream stream;
  std::string chunk;
};

namespace {

thread_local std::string last_error;

/// Run `body`; 0, or the code of its exception, whose message becomes the error line.
template <class Body>
int guarded(const Body& body) noexcept {
  int code = 1;
  const char* what = "unknown error";
  try {
    try {
      body();
      return 0;
    } catch (const autosteer::Error& err) {
      code = err.exit_code;
      last_error = autosteer::unicode::lossy(err.what());  // names of files may be any bytes
    } catch (const std::exception& err) {
      last_error = autosteer::unicode::lossy(err.what());
    } catch (...) {
      last_error = what;
    }
  } catch (...) {  // out of memory for the message
    last_error.clear();
  }
  return code;
}

void need(bool given) {
  if (!given) throw autosteer::InputError("a pointer that must not be NULL is NULL");
}

autosteer_stream* run(const std::shared_ptr<const autosteer::Engine>& engine,
                      const std::shared_ptr<autosteer::Conversation>& conversation, const char* request) {
  auto wanted = autosteer::RequestJson::parse(request);
  const auto policy = engine->policy(wanted.mode, wanted.threshold, wanted.strength);
  return new autosteer_stream{engine,
                              conversation,
                              engine->stream(std::move(wanted.messages), wanted.sampling, policy, conversation.get()),
                              {}};
}

}  // namespace

int autosteer_open(const char* package, const char* options, autosteer_engine** engine) {
  return guarded([&] {
    need(package && engine);
    *engine = nullptr;
    const auto wanted = autosteer::options_from_json(options ? options : "{}");
    *engine = new autosteer_engine{std::make_shared<const autosteer::Engine>(package, wanted)};
  });
}

int autosteer_run(autosteer_engine* engine, const char* request, autosteer_stream** stream) {
  return guarded([&] {
    need(engine && request && stream);
    *stream = nullptr;
    *stream = run(engine->engine, nullptr, request);
  });
}

int autosteer_next(autosteer_stream* stream, const char** chunk) {
  return guarded([&] {
    need(stream && chunk);
    *chunk = nullptr;
    if (const auto piece = stream->stream.next()) {
      stream->chunk = autosteer::chunk_json(*piece).dump();
      *chunk = stream->chunk.c_str();
    }
  });
}

void autosteer_end(autosteer_stream* stream) {
  delete stream;
}

int autosteer_conversation_begin(autosteer_engine* engine, autosteer_conversation** conversation) {
  return guarded([&] {
    need(engine && conversation);
    *conversation = nullptr;
    *conversation = new autosteer_conversation{engine->engine, std::make_shared<autosteer::Conversation>()};
  });
}

int autosteer_conversation_run(autosteer_conversation* conversation, const char* request, autosteer_stream** stream) {
  return guarded([&] {
    need(conversation && request && stream);
    *stream = nullptr;
    *stream = run(conversation->engine, conversation->conversation, request);
  });
}

void autosteer_conversation_end(autosteer_conversation* conversation) {
  delete conversation;
}

void autosteer_close(autosteer_engine* engine) {
  delete engine;
}

const char* autosteer_error(void) {
  return last_error.c_str();
}
