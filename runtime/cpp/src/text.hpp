// From a dialogue to token ids and image slots, and from token ids back to text: the C++ side of runtime/text.py.
//
// The export took the chat template apart into pieces (PromptSpec). Special tokens enter a prompt only as pieces of the
// template. In user text they are plain text, so nobody can forge a turn or an image by typing <|im_end|> or <image>.
#pragma once

#include <algorithm>
#include <cstdint>
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

namespace autosteer {

/// A video among a turn's parts: its frames.
struct VideoPart {
  std::vector<ImageLike> frames;
};

/// A part of a turn: a text, an image (a file or pixels), or a video.
using Part = std::variant<std::string, ImageLike, VideoPart>;

/// One turn of a dialogue.
struct Message {
  std::string role;  ///< system, user or assistant
  std::vector<Part> parts;

  /// A user turn: images, videos (the frames of each; see open_video), then a text.
  static Message user(std::string text, std::vector<ImageLike> images = {},
                      std::vector<std::vector<ImageLike>> videos = {}) {
    Message message{"user", {}};
    for (ImageLike& image : images) message.parts.emplace_back(std::move(image));
    for (auto& frames : videos) message.parts.emplace_back(VideoPart{std::move(frames)});
    message.parts.emplace_back(std::move(text));
    return message;
  }

  static Message assistant(std::string text) { return {"assistant", {std::move(text)}}; }
};

/// Token ids, or the place of an image or a video.
struct Run {
  std::string slot;  ///< "image", "video", or "" for token ids
  std::vector<int64_t> ids;
};

/// A turn that the prober scores: every user turn, and the last turn.
struct AskedTurn {
  size_t index;     ///< among the messages
  int64_t before;   ///< text tokens before its content: earlier turns and its prefix
  int64_t through;  ///< text tokens before its answer
};

/// Token ids of a dialogue, with a run of its own for each image and each video. Adjacent literal and user text are
/// tokenised together, as in the template's own rendering. `asked`, if given, receives the turns that the prober
/// scores, each counted as if the dialogue ended there. Throws InputError for an empty dialogue, an unknown role, an
/// image or a video in a turn that takes none, or text that is not valid Unicode.
inline std::vector<Run> render(const std::vector<Message>& messages, const PromptSpec& spec, const Tokenizer& tokenizer,
                               std::vector<AskedTurn>* asked = nullptr) {
  if (messages.empty()) throw InputError("the dialogue is empty");
  std::vector<Run> runs;
  std::string text;  // literal and user text since the last token or image
  const auto add_ids = [&](const std::vector<int64_t>& ids) {
    if (runs.empty() || !runs.back().slot.empty()) runs.emplace_back();
    runs.back().ids.insert(runs.back().ids.end(), ids.begin(), ids.end());
  };
  const auto end_text = [&] {
    if (!text.empty()) add_ids(tokenizer.encode(text));
    text.clear();
  };
  const auto add_pieces = [&](const std::vector<TemplatePiece>& pieces, std::string_view filling = {}) {
    for (const TemplatePiece& piece : pieces) {
      if (piece.kind == "literal") {
        text += piece.text;
      } else if (piece.kind == "text") {
        text += filling;
      } else {
        end_text();
        if (piece.kind == "token") {
          add_ids({piece.id});
        } else {
          runs.push_back({piece.kind, {}});
        }
      }
    }
  };

  // Number of text tokens so far and of `more`, which has no slots.
  const auto tokens = [&](const std::vector<TemplatePiece>& more) {
    size_t count = 0;
    std::string rest = text;
    for (const Run& run : runs) count += run.ids.size();
    for (const TemplatePiece& piece : more) {
      if (piece.kind == "literal") {
        rest += piece.text;
        continue;
      }
      count += 1 + (rest.empty() ? 0 : tokenizer.encode(rest).size());
      rest.clear();
    }
    return static_cast<int64_t>(count + (rest.empty() ? 0 : tokenizer.encode(rest).size()));
  };

  if (messages[0].role != "system") add_pieces(spec.begin);
  for (size_t n = 0; n < messages.size(); ++n) {
    const Message& message = messages[n];
    const bool scored = asked && (message.role == "user" || n + 1 == messages.size());
    const TurnSpec* turn = message.role == "user"                    ? &spec.user
                           : message.role == "assistant"             ? &spec.assistant
                           : message.role == "system" && spec.system ? &*spec.system
                                                                     : nullptr;
    if (!turn) throw InputError("this model's prompts have no '" + message.role + "' turn");
    std::vector<const Part*> parts;
    for (const Part& part : message.parts) parts.push_back(&part);
    if (spec.images_first) {
      const auto rank = [](const Part* part) {  // images, videos, texts
        return std::holds_alternative<std::string>(*part) ? 2 : std::holds_alternative<VideoPart>(*part) ? 1 : 0;
      };
      std::stable_sort(parts.begin(), parts.end(), [&](const Part* a, const Part* b) { return rank(a) < rank(b); });
    }
    add_pieces(turn->prefix);
    if (scored) asked->push_back({n, tokens({}), 0});
    if (!parts.empty() && std::holds_alternative<std::string>(*parts[0])) add_pieces(turn->lead);
    for (const Part* part : parts) {
      if (const auto* words = std::get_if<std::string>(part)) {
        add_pieces(turn->text, spec.strip_text ? strip(*words) : std::string_view(*words));
        continue;
      }
      const bool video = std::holds_alternative<VideoPart>(*part);
      const std::vector<TemplatePiece>& slot = video ? turn->video : turn->image;
      if (slot.empty()) {  // never drop a picture silently, nor move it to another turn
        throw InputError("this model's '" + message.role + "' turns take no " + (video ? "videos" : "images"));
      }
      add_pieces(slot);
    }
    add_pieces(turn->suffix);
    if (scored) asked->back().through = tokens(spec.generation);
  }
  add_pieces(spec.generation);
  end_text();
  return runs;
}

/// Turns token ids into text as they come. Emits whole characters only, and no part of a stop string.
class Detokeniser {
 public:
  Detokeniser(const Tokenizer& tokenizer, std::vector<std::string> stop)
      : tokenizer_(tokenizer), stop_(std::move(stop)) {}

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
};

}  // namespace autosteer
