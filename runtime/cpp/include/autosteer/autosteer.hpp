// AutoSteer for C++17: autosteer.h with owners, containers and exceptions. Needs nothing but libautosteer.
//
//     autosteer::Engine engine("package/");
//     for (const autosteer::Chunk& chunk : engine.stream({autosteer::Message::user("what is this?", {"photo.png"})})) {
//       std::cout << chunk.text << std::flush;
//     }
//
// Everything that fails throws autosteer::Error (or std::bad_alloc). docs/embedding.md has whole programs, autosteer.h
// the rest of what callers must know.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <locale>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "autosteer.h"

namespace autosteer {
inline namespace abi1 {

/// What went wrong, in one line. `code` is AUTOSTEER_BAD_PACKAGE and so on.
class Error : public std::runtime_error {
 public:
  Error(const std::string& what, int number) : std::runtime_error(what), code(number) {}
  const int code;
};

namespace detail {

inline void check(int code) {
  if (code) throw Error(autosteer_error(), code);
}

/// A text for C, which would take it to end at a NUL.
inline const char* c_text(const std::string& text) {
  if (text.find('\0') == std::string::npos) return text.c_str();
  throw Error("a text, role or file name has a NUL character", AUTOSTEER_BAD_INPUT);
}

/// An owner of what a C function made.
template <class T>
std::shared_ptr<T> owned(T* made, void (*release)(T*)) {
  return {made, release};
}

/// A JSON object, written member by member.
class Object {
 public:
  template <class T>
  void add(const char* key, const T& value) {
    text_ << (empty_ ? "" : ", ");
    empty_ = false;
    write(key);
    text_ << ": ";
    write(value);
  }
  template <class T>
  void add(const char* key, const std::optional<T>& value) {
    if (value) add(key, *value);
  }
  std::string text() const { return text_.str() + "}"; }

 private:
  static std::ostringstream opened() {
    std::ostringstream text;
    text.imbue(std::locale::classic());  // a program's locale may write 0,5
    text.precision(17);
    text.exceptions(std::ios::badbit);  // or a stream that has no memory leaves out a setting, and says nothing
    text << std::boolalpha << "{";
    return text;
  }
  template <class T>
  std::enable_if_t<std::is_arithmetic_v<T>> write(T value) {
    const bool finite = value - value == 0;  // std::isfinite needs <cmath>, whose `log` and `y1` are in everybody's way
    if (!finite) throw Error("a setting is not a finite number", AUTOSTEER_BAD_INPUT);
    text_ << value;
  }
  void write(const Object& value) { text_ << value.text(); }
  void write(std::string_view value) {
    constexpr char kHex[] = "0123456789abcdef";
    text_ << '"';
    for (const char c : value) {
      if (c == '"' || c == '\\') text_ << '\\' << c;
      if (c == '"' || c == '\\') continue;
      if (static_cast<unsigned char>(c) < 0x20) {
        text_ << "\\u00" << kHex[c >> 4] << kHex[c & 15];
      } else {
        text_ << c;
      }
    }
    text_ << '"';
  }
  void write(const std::vector<std::string>& values) {
    text_ << "[";
    for (size_t i = 0; i < values.size(); ++i) {
      text_ << (i ? ", " : "");
      write(values[i]);
    }
    text_ << "]";
  }

  std::ostringstream text_ = opened();
  bool empty_ = true;
};

}  // namespace detail

/// A picture in memory. Copies share it.
class Image {
 public:
  Image(const std::filesystem::path& file) {  // NOLINT: {"photo.png"} is a list of pictures
    take([&](autosteer_image** image) { return autosteer_image_from_file(detail::c_text(file.native()), image); });
  }
  Image(const char* file) : Image(std::filesystem::path(file)) {}         // NOLINT
  Image(const std::string& file) : Image(std::filesystem::path(file)) {}  // NOLINT

  /// 8-bit red, green, blue from the top; `stride` bytes from one row to the next, or 0 for 3 * width. Copied.
  static Image from_rgb(int64_t width, int64_t height, const uint8_t* data, int64_t stride = 0) {
    return Image([&](autosteer_image** image) { return autosteer_image_from_rgb(width, height, stride, data, image); });
  }

  /// The bytes of a PNG or JPEG file.
  static Image from_bytes(const void* data, size_t size) {
    return Image([&](autosteer_image** image) { return autosteer_image_from_bytes(data, size, image); });
  }

  const autosteer_image* get() const { return image_.get(); }

 private:
  template <class Make, class = std::enable_if_t<std::is_invocable_v<Make, autosteer_image**>>>
  explicit Image(const Make& make) {
    take(make);
  }
  template <class Make>
  void take(const Make& make) {
    autosteer_image* image = nullptr;
    detail::check(make(&image));
    image_ = detail::owned(image, autosteer_image_free);
  }

  std::shared_ptr<autosteer_image> image_;
};

/// Frames. Without seconds (Part), they are 1/24 s apart.
using Video = std::vector<Image>;

/// A text, a picture or a video.
struct Part {
  Part(std::string words) : text(std::move(words)) {}                 // NOLINT: a message is a list of these
  Part(const char* words) : text(words) {}                            // NOLINT
  Part(Image image) : kind(Kind::image), frames{std::move(image)} {}  // NOLINT
  Part(Video video) : kind(Kind::video), frames(std::move(video)) {}  // NOLINT
  /// `at`: when each frame is shown, from the video's beginning. Without, 24 a second.
  Part(Video video, std::vector<double> at) : kind(Kind::video), frames(std::move(video)), seconds(std::move(at)) {}

  enum class Kind { text, image, video };
  Kind kind = Kind::text;
  std::string text;
  std::vector<Image> frames;
  std::vector<double> seconds;
};

/// One turn of a dialogue.
struct Message {
  std::string role;  ///< system, user or assistant
  std::vector<Part> parts;
  bool trusted = false;  ///< your program wrote it, so the gate does not judge it (autosteer_request_trust)

  static Message system(std::string text, bool trusted = false) {
    return {"system", {Part(std::move(text))}, trusted};
  }

  /// An earlier answer. `trusted`: see autosteer_request_trust.
  static Message assistant(std::string text, bool trusted = false) {
    return {"assistant", {Part(std::move(text))}, trusted};
  }

  /// Pictures, then videos, then the text.
  static Message user(std::string text, std::vector<Image> images = {}, std::vector<Video> videos = {}) {
    Message message{"user", {}, false};
    for (Image& image : images) message.parts.emplace_back(std::move(image));
    for (Video& video : videos) message.parts.emplace_back(std::move(video));
    message.parts.emplace_back(std::move(text));
    return message;
  }
};

using Messages = std::vector<Message>;

/// How to answer. What is not set is the package's, or autosteer-run's.
struct Settings {
  std::string policy = "steer";  ///< steer, stop, report or off
  std::optional<double> threshold, strength;
  std::optional<bool> pieces;         ///< false: turns are read as wholes alone (autosteer_request_new)
  std::optional<bool> judge_answers;  ///< true: every answer comes whole, once the gate has judged it; not set: as the
                                      ///< package says, and some settings below (autosteer_request_new) do
  std::optional<int64_t> max_tokens, top_k, seed;
  std::optional<double> temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  std::vector<std::string> stop;
  std::optional<bool> speculate;
  std::map<int64_t, double> logit_bias;  ///< by token id
};

/// How to load a package. autosteer_open explains these; its other options are for programs that pass on JSON.
struct EngineOptions {
  int threads = 0;
  std::optional<int64_t> max_tiles;
  bool low_memory = false;
  bool advise_pages = false;
  std::string onnxruntime;
  std::string audit;
  bool audit_texts = false;
};

/// What the gate made of a prompt.
struct Verdict {
  std::string action;  ///< pass, steer or stop
  bool unsafe = true;   ///< the prompt; false with action stop: the answer was
  double p_unsafe = 0;  ///< NaN if the prober failed, or with policy off
};

/// A piece of an answer. `json` has everything, timings included.
struct Chunk {
  std::string text;
  std::optional<int64_t> token;
  Verdict verdict;
  std::string finish_reason;  ///< empty before the last
  std::string json;
};

/// A whole answer. `json` is that of the last piece.
struct Answer {
  std::string text;
  std::vector<int64_t> token_ids;
  Verdict verdict;
  std::string finish_reason;
  std::string json;
};

/// An answer, while it is made: call `next`, or loop over it once. It ends when it goes.
class Stream {
 public:
  explicit Stream(autosteer_stream* stream) : stream_(detail::owned(stream, autosteer_end)) {}
  Stream(Stream&&) = default;
  Stream& operator=(Stream&&) = default;

  /// The next piece; nothing after the last.
  std::optional<Chunk> next() {
    const autosteer_chunk* chunk = nullptr;
    detail::check(autosteer_next(stream_.get(), &chunk));
    if (!chunk) return std::nullopt;
    return Chunk{chunk->text, chunk->token < 0 ? std::nullopt : std::optional(chunk->token),
                 Verdict{chunk->action, chunk->unsafe != 0, chunk->p_unsafe},
                 chunk->finish_reason ? chunk->finish_reason : "", chunk->json};
  }

  /// From any thread: `next` throws an Error of AUTOSTEER_CANCELLED.
  void cancel() { autosteer_cancel(stream_.get()); }

  class Iterator {
   public:
    using iterator_category = std::input_iterator_tag;
    using value_type = Chunk;
    using difference_type = std::ptrdiff_t;
    using pointer = const Chunk*;
    using reference = const Chunk&;

    explicit Iterator(Stream* stream = nullptr) : stream_(stream) {
      if (stream_) ++*this;
    }
    reference operator*() const { return *chunk_; }
    pointer operator->() const { return &*chunk_; }
    Iterator& operator++() {
      chunk_ = stream_->next();
      return *this;
    }
    bool operator!=(const Iterator& other) const { return chunk_.has_value() != other.chunk_.has_value(); }
    bool operator==(const Iterator& other) const { return !(*this != other); }

   private:
    Stream* stream_;
    std::optional<Chunk> chunk_;
  };
  Iterator begin() { return Iterator(this); }
  Iterator end() { return Iterator(); }

 private:
  std::shared_ptr<autosteer_stream> stream_;
};

namespace detail {

inline std::shared_ptr<autosteer_request> request(const Messages& messages, const Settings& settings) {
  Object sampling, object;
  sampling.add("max_tokens", settings.max_tokens);
  sampling.add("temperature", settings.temperature);
  sampling.add("top_k", settings.top_k);
  sampling.add("top_p", settings.top_p);
  sampling.add("min_p", settings.min_p);
  sampling.add("repetition_penalty", settings.repetition_penalty);
  sampling.add("presence_penalty", settings.presence_penalty);
  sampling.add("frequency_penalty", settings.frequency_penalty);
  Object bias;
  for (const auto& [token, value] : settings.logit_bias) bias.add(std::to_string(token).c_str(), value);
  sampling.add("logit_bias", bias);
  sampling.add("seed", settings.seed);
  sampling.add("stop", settings.stop);
  sampling.add("speculate", settings.speculate);
  object.add("messages", std::vector<std::string>());
  object.add("policy", settings.policy);
  object.add("threshold", settings.threshold);
  object.add("strength", settings.strength);
  object.add("pieces", settings.pieces);
  object.add("judge_answers", settings.judge_answers);
  object.add("sampling", sampling);
  autosteer_request* made = nullptr;
  check(autosteer_request_new(object.text().c_str(), &made));
  auto request = owned(made, autosteer_request_free);
  for (const Message& message : messages) {
    check(autosteer_request_turn(made, c_text(message.role)));
    if (message.trusted) check(autosteer_request_trust(made));
    for (const Part& part : message.parts) {
      std::vector<const autosteer_image*> frames;
      for (const Image& frame : part.frames) frames.push_back(frame.get());
      if (part.kind == Part::Kind::text) check(autosteer_request_text(made, c_text(part.text)));
      if (part.kind == Part::Kind::image) check(autosteer_request_image(made, frames.empty() ? nullptr : frames[0]));
      if (part.kind != Part::Kind::video) continue;
      if (!part.seconds.empty() && part.seconds.size() != frames.size()) {
        throw Error("a video has a second for each frame, or none", AUTOSTEER_BAD_INPUT);
      }
      const double* seconds = part.seconds.empty() ? nullptr : part.seconds.data();
      check(autosteer_request_video_at(made, frames.data(), seconds, frames.size()));
    }
  }
  return request;
}

/// What an engine and a conversation do alike.
template <class Asked>
class Answers {
 public:
  /// Begin an answer. Nothing is computed before its first piece is asked for.
  Stream stream(const Messages& messages, const Settings& settings = {}) const {
    autosteer_stream* stream = nullptr;
    check(static_cast<const Asked*>(this)->run(request(messages, settings).get(), &stream));
    return Stream(stream);
  }
  Stream stream(const std::string& prompt, const Settings& settings = {}) const {
    return stream(Messages{Message::user(prompt)}, settings);
  }

  /// The whole answer. `on_chunk`, if given, is called with each piece; where it returns false, the answer ends, and
  /// finish_reason is empty. A judged answer (autosteer_request_new) is complete before its first piece.
  template <class OnChunk>
  Answer generate(const Messages& messages, const Settings& settings, const OnChunk& on_chunk) const {
    Answer answer;
    for (const Chunk& chunk : stream(messages, settings)) {
      answer.text += chunk.text;
      if (chunk.token) answer.token_ids.push_back(*chunk.token);
      answer.verdict = chunk.verdict;
      answer.finish_reason = chunk.finish_reason;
      answer.json = chunk.json;
      if constexpr (std::is_void_v<std::invoke_result_t<const OnChunk&, const Chunk&>>) {
        on_chunk(chunk);
      } else if (!on_chunk(chunk)) {
        break;
      }
    }
    return answer;
  }
  Answer generate(const Messages& messages, const Settings& settings = {}) const {
    return generate(messages, settings, [](const Chunk&) {});
  }
  Answer generate(const std::string& prompt, const Settings& settings = {}) const {
    return generate(Messages{Message::user(prompt)}, settings);
  }
};

}  // namespace detail

/// A dialogue's turns, which share what they have computed. You still pass all messages.
class Conversation : public detail::Answers<Conversation> {
 public:
  explicit Conversation(const autosteer_engine* engine) {
    autosteer_conversation* made = nullptr;
    detail::check(autosteer_conversation_begin(engine, &made));
    conversation_ = detail::owned(made, autosteer_conversation_end);
  }
  int run(const autosteer_request* request, autosteer_stream** stream) const {
    return autosteer_conversation_run(conversation_.get(), request, stream);
  }

 private:
  std::shared_ptr<autosteer_conversation> conversation_;
};

/// A loaded package. Copies share it.
class Engine : public detail::Answers<Engine> {
 public:
  explicit Engine(const std::filesystem::path& package, const EngineOptions& options = {}) {
    detail::Object object;
    object.add("threads", options.threads);
    object.add("max_tiles", options.max_tiles);
    object.add("low_memory", options.low_memory);
    object.add("advise_pages", options.advise_pages);
    if (!options.onnxruntime.empty()) object.add("onnxruntime", options.onnxruntime);
    if (!options.audit.empty()) object.add("audit", options.audit);
    object.add("audit_texts", options.audit_texts);
    autosteer_engine* made = nullptr;
    detail::check(autosteer_open(detail::c_text(package.native()), object.text().c_str(), &made));
    engine_ = detail::owned(made, autosteer_close);
  }

  /// Valid as long as a copy of this engine.
  const autosteer_info& info() const { return *autosteer_describe(engine_.get()); }

  Conversation conversation() const { return Conversation(engine_.get()); }

  int64_t count_tokens(const Messages& messages) const {
    int64_t count = 0;
    detail::check(autosteer_count_tokens(engine_.get(), detail::request(messages, {}).get(), &count));
    return count;
  }

  /// What the gate makes of a prompt, without an answer: half of the model reads it.
  Verdict score(const Messages& messages, const Settings& settings = {}) const {
    const char* action = nullptr;
    int unsafe = 1;
    double p_unsafe = 0;
    const auto request = detail::request(messages, settings);
    detail::check(autosteer_score(engine_.get(), request.get(), &action, &unsafe, &p_unsafe));
    return {action, unsafe != 0, p_unsafe};
  }
  Verdict score(const std::string& prompt, const Settings& settings = {}) const {
    return score(Messages{Message::user(prompt)}, settings);
  }

  int run(const autosteer_request* request, autosteer_stream** stream) const {
    return autosteer_run(engine_.get(), request, stream);
  }

 private:
  std::shared_ptr<autosteer_engine> engine_;
};

}  // namespace abi1
}  // namespace autosteer
