// The C functions of autosteer.h, on the C++ engine. Exceptions become error codes here.
#include "autosteer/autosteer.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine.hpp"
#include "json.hpp"

#undef autosteer_open

struct autosteer_engine {
  std::shared_ptr<const autosteer::Engine> engine;
  autosteer_info info;
};

struct autosteer_image {
  autosteer::Pixels image;
};

struct autosteer_request {
  autosteer::RequestJson request;
};

struct autosteer_conversation {
  std::shared_ptr<const autosteer::Engine> engine;
  std::shared_ptr<autosteer::Conversation> conversation;
};

struct autosteer_stream {
  std::shared_ptr<const autosteer::Engine> engine;
  std::shared_ptr<autosteer::Conversation> conversation;  // null: nothing is shared
  autosteer::Stream stream;
  autosteer::Chunk piece;  // `chunk` points into this and into `json`
  std::string json;
  autosteer_chunk chunk;
};

namespace {

thread_local std::string last_error;

/// One line of valid UTF-8: what a message quotes, the name of a file above all, may be any bytes.
std::string one_line(const char* message) { return autosteer::in_one_line(autosteer::unicode::lossy(message)); }

/// Run `body`; 0, or the code of its exception, whose message becomes the error line.
template <class Body>
int guarded(const Body& body) noexcept {
  int code = AUTOSTEER_FAILED;
  try {
    try {
      body();
      return AUTOSTEER_OK;
    } catch (const autosteer::Error& err) {
      code = err.exit_code;
      last_error = one_line(err.what());
    } catch (const std::exception& err) {
      last_error = one_line(err.what());
    } catch (...) {
      last_error = "unknown error";
    }
  } catch (...) {  // out of memory for the message
    last_error.clear();
  }
  return code;
}

/// Throws InputError for a NULL, with the argument's name.
void need(const void* pointer, const char* argument) {
  if (!pointer) throw autosteer::InputError(std::string(argument) + " is NULL");
}

/// Where a handle goes; NULL in it until it is made.
template <class Handle>
void empty(Handle** handle, const char* argument) {
  need(handle, argument);
  *handle = nullptr;
}

autosteer_info describe(const autosteer::Manifest& manifest) {
  return {manifest.precision.c_str(),
          autosteer::onnxruntime_version(),
          manifest.dims.context_length,
          manifest.prober.has_value(),
          manifest.image.has_value(),
          manifest.video.has_value(),
          manifest.prober ? manifest.prober->threshold : 0.0,
          manifest.refusal ? manifest.refusal->strength : 0.0};
}

autosteer::Image pixels(int64_t width, int64_t height, int64_t stride, const uint8_t* data) {
  autosteer::picture::check_size(height, width);
  const int64_t row = 3 * width;
  if (stride != 0 && stride < row) {
    throw autosteer::InputError("image: a stride of " + std::to_string(stride) + " bytes, but a row has " +
                                std::to_string(row));
  }
  autosteer::Image image{height, width, std::vector<uint8_t>(static_cast<size_t>(row * height))};
  for (int64_t y = 0; y < height; ++y) {
    std::memcpy(image.at(y, 0), data + y * (stride ? stride : row), static_cast<size_t>(row));
  }
  return image;
}

/// The image, checked.
autosteer::Pixels open(autosteer::Image image) {
  return autosteer::open_image(std::make_shared<const autosteer::Image>(std::move(image)));
}

autosteer::Message& latest(autosteer_request* request) {
  if (request->request.messages.empty()) throw autosteer::InputError("begin a message first: autosteer_request_turn");
  return request->request.messages.back();
}

/// The policy of a request. Throws InputError where the engine has one for all requests, and this one changes it.
autosteer::GatePolicy policy_of(const autosteer::Engine& engine, const autosteer::RequestJson& asked) {
  if (!engine.only_policy) {
    return engine.policy(asked.mode, asked.threshold, asked.strength, asked.pieces,
                         asked.judge_answers ? asked.judge_answers : engine.judge_answers);
  }
  if (!asked.changes_gate) return engine.policy(*engine.only_policy, {}, {}, true, engine.judge_answers);
  throw autosteer::InputError(
      "this engine has a policy for all requests: leave out policy, threshold, strength, pieces, judge_answers and "
      "trusted");
}

autosteer_stream* run(const std::shared_ptr<const autosteer::Engine>& engine,
                      const std::shared_ptr<autosteer::Conversation>& conversation,
                      const autosteer::RequestJson& request) {
  const auto policy = policy_of(*engine, request);
  return new autosteer_stream{
      engine, conversation, engine->stream(request.messages, request.sampling, policy, conversation.get()), {}, {}, {}};
}

autosteer_chunk view(const autosteer::Chunk& piece, const std::string& json) {
  return {json.c_str(),
          piece.text.c_str(),
          piece.finish_reason.empty() ? nullptr : piece.finish_reason.c_str(),
          autosteer::name(piece.verdict.action),
          piece.verdict.unsafe,
          piece.verdict.p_unsafe.value_or(std::nan("")),
          piece.token.value_or(-1)};
}

}  // namespace

const char* autosteer_version(void) {
  return AUTOSTEER_VERSION;
}

int autosteer_abi(void) {
  return AUTOSTEER_ABI;
}

const char* autosteer_error(void) {
  return last_error.c_str();
}

void autosteer_set_log(autosteer_log log, void* context) {
  guarded([&] {
    if (!log) return autosteer::set_log({});
    autosteer::set_log([=](const std::string& line) {
      try {
        log(line.c_str(), context);
      } catch (...) {  // a C++ host's; onnxruntime calls this, too, and nothing there would catch it
      }
    });
  });
}

int autosteer_open(const char* package, const char* options, autosteer_engine** engine) {
  return guarded([&] {
    empty(engine, "engine");
    need(package, "package");
    auto wanted = autosteer::options_from_json(options ? options : "{}");
    wanted.log = autosteer::log_line;
    auto loaded = std::make_shared<const autosteer::Engine>(package, wanted);
    const autosteer_info info = describe(loaded->manifest);
    *engine = new autosteer_engine{std::move(loaded), info};
  });
}

int autosteer_open_abi(int abi, const char* package, const char* options, autosteer_engine** engine) {
  const int checked = guarded([&] {
    if (abi == AUTOSTEER_ABI) return;
    throw autosteer::Error("this program was compiled for ABI " + std::to_string(abi) + " of libautosteer, and " +
                           AUTOSTEER_VERSION + " has ABI " + std::to_string(AUTOSTEER_ABI) + "; compile it again");
  });
  return checked ? checked : autosteer_open(package, options, engine);
}

void autosteer_close(autosteer_engine* engine) {
  delete engine;
}

const autosteer_info* autosteer_describe(const autosteer_engine* engine) {
  return engine ? &engine->info : nullptr;
}

int autosteer_image_from_rgb(int64_t width, int64_t height, int64_t stride, const uint8_t* data,
                             autosteer_image** image) {
  return guarded([&] {
    empty(image, "image");
    need(data, "data");
    *image = new autosteer_image{open(pixels(width, height, stride, data))};
  });
}

int autosteer_image_from_bytes(const void* data, size_t size, autosteer_image** image) {
  return guarded([&] {
    empty(image, "image");
    need(data, "data");
    const auto* bytes = static_cast<const uint8_t*>(data);
    *image = new autosteer_image{open(autosteer::decode_picture({bytes, bytes + size}, "image"))};
  });
}

int autosteer_image_from_file(const char* path, autosteer_image** image) {
  return guarded([&] {
    empty(image, "image");
    need(path, "path");
    *image = new autosteer_image{autosteer::open_image(autosteer::fs::path(path))};
  });
}

void autosteer_image_free(autosteer_image* image) {
  delete image;
}

int autosteer_request_new(const char* json, autosteer_request** request) {
  return guarded([&] {
    empty(request, "request");
    *request = new autosteer_request{json ? autosteer::RequestJson::parse(json) : autosteer::RequestJson()};
  });
}

void autosteer_request_free(autosteer_request* request) {
  delete request;
}

int autosteer_request_turn(autosteer_request* request, const char* role) {
  return guarded([&] {
    need(request, "request");
    need(role, "role");
    request->request.messages.push_back({role, {}});
  });
}

int autosteer_request_trust(autosteer_request* request) {
  return guarded([&] {
    need(request, "request");
    latest(request).trusted = true;
  });
}

int autosteer_request_text(autosteer_request* request, const char* text) {
  return guarded([&] {
    need(request, "request");
    need(text, "text");
    latest(request).parts.emplace_back(std::string(text));
  });
}

int autosteer_request_image(autosteer_request* request, const autosteer_image* image) {
  return guarded([&] {
    need(request, "request");
    need(image, "image");
    latest(request).parts.emplace_back(autosteer::ImageLike(image->image));
  });
}

int autosteer_request_video(autosteer_request* request, const autosteer_image* const* frames, size_t count) {
  return autosteer_request_video_at(request, frames, nullptr, count);
}

int autosteer_request_video_at(autosteer_request* request, const autosteer_image* const* frames, const double* seconds,
                               size_t count) {
  return guarded([&] {
    need(request, "request");
    if (count) need(frames, "frames");
    autosteer::VideoPart video;
    for (size_t i = 0; i < count; ++i) {
      need(frames[i], "a frame");
      video.frames.emplace_back(frames[i]->image);
      if (seconds) video.seconds.push_back(seconds[i]);
    }
    latest(request).parts.emplace_back(std::move(video));
  });
}

int autosteer_count_tokens(const autosteer_engine* engine, const autosteer_request* request, int64_t* count) {
  return guarded([&] {
    need(engine, "engine");
    need(request, "request");
    need(count, "count");
    *count = engine->engine->count_tokens(request->request.messages);
  });
}

int autosteer_score(const autosteer_engine* engine, const autosteer_request* request, const char** action, int* unsafe,
                    double* p_unsafe) {
  return guarded([&] {
    need(engine, "engine");
    need(request, "request");
    const autosteer::RequestJson& asked = request->request;
    const auto policy = policy_of(*engine->engine, asked);
    const autosteer::Verdict verdict = engine->engine->score(asked.messages, policy);
    if (action) *action = autosteer::name(verdict.action);
    if (unsafe) *unsafe = verdict.unsafe;
    if (p_unsafe) *p_unsafe = verdict.p_unsafe.value_or(std::nan(""));
  });
}

int autosteer_run(const autosteer_engine* engine, const autosteer_request* request, autosteer_stream** stream) {
  return guarded([&] {
    empty(stream, "stream");
    need(engine, "engine");
    need(request, "request");
    *stream = run(engine->engine, nullptr, request->request);
  });
}

int autosteer_next(autosteer_stream* stream, const autosteer_chunk** chunk) {
  return guarded([&] {
    empty(chunk, "chunk");
    need(stream, "stream");
    if (auto piece = stream->stream.next()) {
      stream->piece = std::move(*piece);
      stream->json = autosteer::chunk_json(stream->piece).dump();
      stream->chunk = view(stream->piece, stream->json);
      *chunk = &stream->chunk;
    }
  });
}

void autosteer_cancel(autosteer_stream* stream) {
  guarded([&] {
    if (stream) stream->stream.cancel();
  });
}

void autosteer_end(autosteer_stream* stream) {
  delete stream;
}

int autosteer_conversation_begin(const autosteer_engine* engine, autosteer_conversation** conversation) {
  return guarded([&] {
    empty(conversation, "conversation");
    need(engine, "engine");
    *conversation = new autosteer_conversation{engine->engine, std::make_shared<autosteer::Conversation>()};
  });
}

int autosteer_conversation_run(autosteer_conversation* conversation, const autosteer_request* request,
                               autosteer_stream** stream) {
  return guarded([&] {
    empty(stream, "stream");
    need(conversation, "conversation");
    need(request, "request");
    *stream = run(conversation->engine, conversation->conversation, request->request);
  });
}

void autosteer_conversation_end(autosteer_conversation* conversation) {
  delete conversation;
}
