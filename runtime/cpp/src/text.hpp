// From a dialogue to token ids and image slots, and from token ids back to text: the C++ side of runtime/text.py.
//
// The export took the chat template apart into pieces (PromptSpec). Special tokens enter a prompt only as pieces of the
// template. In user text they are plain text, so nobody can forge a turn or an image by typing <|im_end|> or <image>.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <iomanip>
#include <locale>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "errors.hpp"
#include "image.hpp"
#include "manifest.hpp"
#include "tokenizer.hpp"
#include "unicode.hpp"
#include "video.hpp"

namespace autosteer {

/// A part of a turn: a text, an image (a file or pixels), or a video.
using Part = std::variant<std::string, ImageLike, VideoPart>;

/// One turn of a dialogue.
struct Message {
  std::string role;  ///< system, user or assistant
  std::vector<Part> parts;
  bool trusted = false;  ///< your program wrote it itself, so the gate does not judge it; never a user turn

  /// A system turn. `trusted`: it is your program's own text.
  static Message system(std::string text, bool trusted = false) { return {"system", {std::move(text)}, trusted}; }

  /// A user turn: images, videos (see open_video), then a text.
  static Message user(std::string text, std::vector<ImageLike> images = {}, std::vector<VideoPart> videos = {}) {
    Message message{"user", {}, false};
    for (ImageLike& image : images) message.parts.emplace_back(std::move(image));
    for (VideoPart& video : videos) message.parts.emplace_back(std::move(video));
    message.parts.emplace_back(std::move(text));
    return message;
  }

  /// An earlier answer. `trusted`: it came from this engine, as it is, in this dialogue.
  static Message assistant(std::string text, bool trusted = false) {
    return {"assistant", {std::move(text)}, trusted};
  }
};

/// Whether a picture, or a frame of a video, is the name of a file.
inline bool names_a_file(const Message& message) {
  const auto is_file = [](const ImageLike& image) { return std::holds_alternative<std::filesystem::path>(image); };
  return std::any_of(message.parts.begin(), message.parts.end(), [&](const Part& part) {
    if (const auto* image = std::get_if<ImageLike>(&part)) return is_file(*image);
    const auto* video = std::get_if<VideoPart>(&part);
    return video && std::any_of(video->frames.begin(), video->frames.end(), is_file);
  });
}

/// Token ids, or the place of an image, a video, or a group of its frames.
struct Run {
  std::string slot;  ///< "image", "video" (or a group of its frames), or "" for token ids
  std::vector<int64_t> ids;
};

/// A place in a rendered prompt: what stands before it.
struct Place {
  int64_t tokens;  ///< text tokens
  size_t slots;    ///< images, and videos or groups of their frames
};

/// A turn that the prober scores, counted as if the dialogue ended there.
struct JudgedTurn {
  Place content;   ///< where its content begins, behind its prefix
  Place end;       ///< where its answer would begin, behind the generation prompt
  int64_t unlike;  ///< of the last tokens before `end`, those that the prompt has otherwise, as the dialogue goes on
};

namespace rendering {

/// Writes pieces as runs. Adjacent literal and user text are tokenised together, as in the template's own rendering.
class Writer {
 public:
  explicit Writer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  std::vector<Run> runs;

  /// Add pieces; `filling` is the text of those of kind `text` or `seconds`.
  void write(const std::vector<TemplatePiece>& pieces, std::string_view filling = {}) {
    for (const TemplatePiece& piece : pieces) {
      if (piece.kind == "literal") {
        text_ += piece.text;
      } else if (piece.kind == "text" || piece.kind == "seconds") {
        text_ += filling;
      } else {
        close_text();
        if (piece.kind == "token") {
          add({piece.id});
        } else {
          runs.push_back({piece.kind, {}});
          ++slots_;
        }
      }
    }
  }

  /// The place `ahead` tokens behind the last token or slot.
  Place place(size_t ahead) const { return {tokens_ + static_cast<int64_t>(ahead), slots_}; }

  /// The tokens behind that place, if the prompt ended with `more`, which has no slots.
  std::vector<int64_t> ahead(const std::vector<TemplatePiece>& more = {}) const {
    std::vector<int64_t> ids;
    std::string text = text_;
    const auto close = [&] {
      const std::vector<int64_t> closed = text.empty() ? std::vector<int64_t>{} : tokenizer_.encode(text);
      ids.insert(ids.end(), closed.begin(), closed.end());
      text.clear();
    };
    for (const TemplatePiece& piece : more) {
      if (piece.kind == "literal") {
        text += piece.text;
        continue;
      }
      close();
      ids.push_back(piece.id);
    }
    close();
    return ids;
  }

  void close_text() {
    if (!text_.empty()) add(tokenizer_.encode(text_));
    text_.clear();
  }

 private:
  void add(const std::vector<int64_t>& ids) {
    tokens_ += static_cast<int64_t>(ids.size());
    if (runs.empty() || !runs.back().slot.empty()) runs.emplace_back();
    runs.back().ids.insert(runs.back().ids.end(), ids.begin(), ids.end());
  }

  const Tokenizer& tokenizer_;
  std::string text_;  // literal and user text since the last token or slot
  int64_t tokens_ = 0;
  size_t slots_ = 0;
};

/// Add the parts of a turn. Throws InputError for an image or a video in a turn that takes none.
inline void write_parts(Writer& writer, const Message& message, const TurnSpec& turn, const PromptSpec& spec) {
  std::vector<const Part*> parts;
  for (const Part& part : message.parts) parts.push_back(&part);
  if (spec.images_first) {
    const auto rank = [](const Part* part) {  // images, videos, texts
      return std::holds_alternative<std::string>(*part) ? 2 : std::holds_alternative<VideoPart>(*part) ? 1 : 0;
    };
    std::stable_sort(parts.begin(), parts.end(), [&](const Part* a, const Part* b) { return rank(a) < rank(b); });
  }
  if (!parts.empty() && std::holds_alternative<std::string>(*parts[0])) writer.write(turn.lead);
  for (const Part* part : parts) {
    if (const auto* words = std::get_if<std::string>(part)) {
      writer.write(turn.text, spec.strip_text ? strip(*words) : std::string_view(*words));
      continue;
    }
    const auto* video = std::get_if<VideoPart>(part);
    const std::vector<TemplatePiece>& slot = video ? turn.video : turn.image;
    if (slot.empty()) {  // never drop a picture silently, nor move it to another turn
      throw InputError("this model's '" + message.role + "' turns take no " + (video ? "videos" : "images"));
    }
    for (const TemplatePiece& piece : slot) {
      if (!video || piece.kind != "video" || !spec.frame_group) {
        writer.write({piece});
        continue;
      }
      for (const double time : group_times(moments(*video), spec.frame_group->frames)) {
        std::ostringstream seconds;
        seconds.imbue(std::locale::classic());  // a host's locale may write 0,5
        seconds << std::fixed << std::setprecision(1) << time;
        writer.write(spec.frame_group->pieces, seconds.str());
      }
    }
  }
}

/// A turn as it ends before the dialogue goes on.
struct TurnEnd {
  Place content, closed;       // `closed`: the last token or slot that nothing can change
  std::vector<int64_t> ahead;  // the tokens between `closed` and the end
};

/// `rows`: the whole prompt's token ids, and -1 for each image and video.
inline JudgedTurn judged(const TurnEnd& turn, const std::vector<int64_t>& rows) {
  const auto size = static_cast<int64_t>(turn.ahead.size());
  const auto first = rows.begin() + turn.closed.tokens + static_cast<int64_t>(turn.closed.slots);
  const auto differ = std::mismatch(turn.ahead.begin(), turn.ahead.end(), first, rows.end());
  return {turn.content, {turn.closed.tokens + size, turn.closed.slots}, turn.ahead.end() - differ.first};
}

}  // namespace rendering

/// Throws InputError for a user turn without a word, an image or a video. Other turns may be empty.
inline void check_turns(const std::vector<Message>& messages) {
  const auto is_blank = [](const Part& part) {
    const auto* words = std::get_if<std::string>(&part);
    return words && strip(*words).empty();
  };
  for (const Message& message : messages) {
    if (message.role == "user" && std::all_of(message.parts.begin(), message.parts.end(), is_blank)) {
      throw InputError("a user turn is empty: give it a text, or an image or a video");
    }
  }
}

/// Whether the prober scores a turn.
inline bool is_judged(const std::vector<Message>& messages, size_t turn) {
  return !messages[turn].trusted || turn + 1 == messages.size();
}

/// Token ids of a dialogue, with a run of its own for each image and each video. `judged` receives the turns that the
/// prober scores: all but the trusted ones, and the last in any case. Throws InputError for an empty dialogue, an
/// unknown role, an image or a video in a turn that takes none, a trusted user turn, or text that is not valid Unicode.
inline std::vector<Run> render(const std::vector<Message>& messages, const PromptSpec& spec, const Tokenizer& tokenizer,
                               std::vector<JudgedTurn>& judged) {
  if (messages.empty()) throw InputError("the dialogue is empty");
  rendering::Writer writer(tokenizer);
  std::vector<rendering::TurnEnd> ends;
  if (messages[0].role != "system") writer.write(spec.begin);
  for (const Message& message : messages) {
    const TurnSpec* turn = message.role == "user"                    ? &spec.user
                           : message.role == "assistant"             ? &spec.assistant
                           : message.role == "system" && spec.system ? &*spec.system
                                                                     : nullptr;
    if (!turn) throw InputError("this model's prompts have no '" + message.role + "' turn");
    if (message.trusted && message.role == "user") {
      throw InputError("a user turn cannot be trusted: it is what the gate judges");
    }
    writer.write(turn->prefix);
    const Place content = writer.place(writer.ahead().size());
    rendering::write_parts(writer, message, *turn, spec);
    writer.write(turn->suffix);
    if (is_judged(messages, static_cast<size_t>(&message - messages.data()))) {
      ends.push_back({content, writer.place(0), writer.ahead(spec.generation)});
    }
  }
  writer.write(spec.generation);
  writer.close_text();
  std::vector<int64_t> rows;
  for (const Run& run : writer.runs) {
    run.slot.empty() ? void(rows.insert(rows.end(), run.ids.begin(), run.ids.end())) : rows.push_back(-1);
  }
  for (const rendering::TurnEnd& end : ends) judged.push_back(rendering::judged(end, rows));
  return std::move(writer.runs);
}

/// Turns token ids into text as they come. Emits whole characters only, and no part of a stop string.
class Detokeniser {
 public:
  Detokeniser(const Tokenizer& tokenizer, std::vector<std::string> stop)
      : tokenizer_(tokenizer), stop_(std::move(stop)), strips_(tokenizer.strips()) {}

  bool stopped = false;  ///< a stop string is complete

  /// The text that `token` completes.
  std::string push(int64_t token) {
    held_ += characters(token);
    size_t found = std::string::npos;
    for (const std::string& stop : stop_) found = std::min(found, held_.find(stop));
    if (found != std::string::npos) {
      stopped = true;
      std::string text = held_.substr(0, found);
      held_.clear();
      return text;
    }
    size_t keep = 0;
    for (const std::string& stop : stop_) keep = std::max(keep, overlap(held_, stop));
    std::string text = held_.substr(0, held_.size() - keep);
    held_.erase(0, text.size());
    return text;
  }

  /// The text held back, if the answer ends without a stop string.
  std::string flush() { return std::exchange(held_, {}); }

 private:
  /// The text of the bytes so far; empty while they end within a character.
  std::string characters(int64_t token) {
    bytes_ += tokenizer_.bytes(token);
    if (strips_ && !bytes_.empty()) {
      if (bytes_.front() == ' ') bytes_.erase(0, 1);
      strips_ = false;
    }
    std::string text = unicode::lossy(bytes_);
    constexpr std::string_view replacement = "\xEF\xBF\xBD";
    const bool incomplete = text.size() >= replacement.size() &&
                            text.compare(text.size() - replacement.size(), replacement.size(), replacement) == 0;
    if (incomplete) return "";
    bytes_.clear();
    return text;
  }

  /// Length of the longest suffix of `text` that is a proper prefix of `stop`.
  static size_t overlap(std::string_view text, std::string_view stop) {
    for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
      if (text.substr(text.size() - n) == stop.substr(0, n)) return n;
    }
    return 0;
  }

  const Tokenizer& tokenizer_;
  std::vector<std::string> stop_;
  std::string bytes_;  // of an incomplete character
  std::string held_;   // text that may be the start of a stop string
  bool strips_;        // a space that begins the answer is not shown
};

}  // namespace autosteer
