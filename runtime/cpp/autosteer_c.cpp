// The C functions of autosteer.h over the C++ engine: exceptions become codes here, and nothing else happens.
#include "autosteer.h"

#include <exception>
#include <memory>
#include <string>

#include "json.hpp"

struct autosteer_engine {
  std::shared_ptr<const autosteer::Engine> engine;
};

struct autosteer_stream {
  std::shared_ptr<const autosteer::Engine> engine;
  autosteer::Stream stream;
  std::string chunk;
};

namespace {

thread_local std::string last_error;

/// Run `body`; its exception becomes the error line and the code that is returned.
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
      last_error = err.what();
    } catch (const std::exception& err) {
      last_error = err.what();
    } catch (...) {
      last_error = what;
    }
  } catch (...) {  // no memory for the message
    last_error.clear();
  }
  return code;
}

void need(bool given) {
  if (!given) throw autosteer::InputError("a pointer that must not be NULL is NULL");
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
    auto wanted = autosteer::RequestJson::parse(request);
    const autosteer::Engine& loaded = *engine->engine;
    const auto policy = loaded.policy(wanted.mode, wanted.threshold, wanted.strength);
    *stream =
        new autosteer_stream{engine->engine, loaded.stream(std::move(wanted.messages), wanted.sampling, policy), {}};
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

void autosteer_close(autosteer_engine* engine) {
  delete engine;
}

const char* autosteer_error(void) {
  return last_error.c_str();
}
