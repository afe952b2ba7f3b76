// What the prober is asked about a dialogue, and about an answer that is judged (held_back.hpp). The C++ side of
// runtime/judge.py.
//
//     prompt   every turn that is not trusted, where it stands; a user's turn by itself, too; a turn of several texts,
//              and a user's turns in a row, as one text; what has obfuscated letters in plain ones (obfuscation.hpp);
//              and the pieces of all these (pieces.hpp). What is not the turn itself is read by itself, and where the
//              turn stands. Also all that the user said, as one text; and a user's words with each of several pictures
//     answer   as if the user had said it, and its pieces; in plain letters, too; by itself, and as the dialogue's next
//              turn: of a steered answer, whose dialogue is unsafe, in place of the last turn's words
//
// A harmless question that was answered before, or that stands beside it, can draw the prober's eye from a request that
// it catches by itself. So can a harmless picture. The worst score counts; a piece's is weighed. Pieces are read until
// one is unsafe. What is unsafe in another reading than the turn itself is stopped, not steered: the Refusal Head was
// trained on whole plain turns. So is a dialogue with an unsafe turn before the last: it was trained on requests that
// come last.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "audit.hpp"
#include "conversation.hpp"
#include "digest.hpp"
#include "encoded_prompt.hpp"
#include "errors.hpp"
#include "gate.hpp"
#include "generation.hpp"
#include "obfuscation.hpp"
#include "pieces.hpp"
#include "prompt_encoder.hpp"
#include "stats.hpp"
#include "text.hpp"

namespace autosteer {

/// A turn with obfuscated letters as a user's in plain ones; nothing if it has no such letters. Texts that follow each
/// other are read as one: "b4" and "d" say "bad".
inline std::optional<Message> in_plain_letters(const Message& turn) {
  Message plain{"user", {}};
  for (const Part& part : turn.parts) {
    const auto* text = std::get_if<std::string>(&part);
    auto* before = plain.parts.empty() ? nullptr : std::get_if<std::string>(&plain.parts.back());
    text && before ? void(*before += *text) : plain.parts.push_back(part);
  }
  bool obfuscated = false;
  for (Part& part : plain.parts) {
    auto* text = std::get_if<std::string>(&part);
    if (!text) continue;
    std::string letters = deobfuscated(*text);
    obfuscated = obfuscated || letters != *text;
    *text = std::move(letters);
  }
  return obfuscated ? std::optional(std::move(plain)) : std::nullopt;
}

/// The pictures and videos of a turn.
inline std::vector<Part> shown_in(const Message& turn) {
  std::vector<Part> shown;
  for (const Part& part : turn.parts) {
    if (!std::holds_alternative<std::string>(part)) shown.push_back(part);
  }
  return shown;
}

/// A turn's text, with a blank for each picture or video between its words.
inline std::string text_of(const Message& turn) {
  std::string text;
  for (const Part& part : turn.parts) {
    const auto* said = std::get_if<std::string>(&part);
    text += said ? *said : " ";
  }
  const auto is_word = [](char c) { return !is_space(c); };
  const auto end = std::find_if(text.rbegin(), text.rend(), is_word).base();
  return {std::find_if(text.begin(), end, is_word), end};
}

/// A user's turn with `text` behind all that it shows.
inline Message user_turn(std::vector<Part> shown, std::string text) {
  shown.emplace_back(std::move(text));
  return {"user", std::move(shown)};
}

/// A piece of a turn, as a user's turn with all that the turn shows in front.
struct Piece {
  Message turn;
  bool is_part;  // it has only some of the words
};

/// The pieces of a turn; see pieces.hpp.
inline std::vector<Piece> cut(const Message& turn) {
  const std::vector<Part> shown = shown_in(turn);
  const std::string text = text_of(turn), whole = in_single_blanks(text);
  std::vector<Piece> found;
  for (std::string& piece : pieces(text)) {
    const bool is_part = piece != whole;
    found.push_back({user_turn(shown, std::move(piece)), is_part});
  }
  return found;
}

/// A turn as the prober reads it beside the turn itself.
struct Reading {
  std::vector<Message> messages;  // the turn is the last; before it, what came before, or nothing
  Span pictures;                  // numbers, of all that the dialogue shows: the first, and one past the last
  bool if_safe = false;           // read only while the readings before it are safe
  bool stops = false;             // what is unsafe in it is stopped, not steered
  bool piece = false;             // it has only some of the turn's words, or of the pictures
  int prefix = 0;                 // those of one number begin alike; 0: by itself
};

/// A user's turn, and how many turns it joins.
struct Whole {
  Message turn;
  size_t turns;
};

/// Some turns' texts as one, joined by `between`; nothing if there are fewer than two.
inline std::optional<std::string> joined_texts(const std::vector<const Message*>& turns, const char* between) {
  std::string text;
  size_t count = 0;
  for (const Message* turn : turns) {
    for (const Part& part : turn->parts) {
      if (const auto* said = std::get_if<std::string>(&part)) text += (count++ ? between : "") + *said;
    }
  }
  return count > 1 ? std::optional(std::move(text)) : std::nullopt;
}

/// The texts of turn `n` as one, if it has several, and those of the user's turns in a row that it ends; each as a
/// user's turn with all that is shown in front.
///
/// A request may be spread over them, a word or a letter each, among harmless ones. What a template writes between two
/// texts is its own affair, so they are joined by line ends, and by nothing.
inline std::vector<Whole> as_one(const std::vector<Message>& messages, size_t n) {
  size_t row = 1;
  if (messages[n].role == "user" && (n + 1 == messages.size() || messages[n + 1].role != "user")) {
    while (row <= n && messages[n - row].role == "user") ++row;
  }
  std::vector<Whole> found;
  for (const size_t turns : std::set<size_t>{1, row}) {
    std::vector<const Message*> those;
    std::vector<Part> shown;
    for (size_t i = n + 1 - turns; i <= n; ++i) {
      those.push_back(&messages[i]);
      for (Part& part : shown_in(messages[i])) shown.push_back(std::move(part));
    }
    for (const char* between : {"\n", ""}) {
      if (std::optional<std::string> text = joined_texts(those, between)) {
        found.push_back({user_turn(shown, std::move(*text)), turns});
      }
    }
  }
  return found;
}

/// All that the user says as one text, as in `as_one`, and in plain letters, if turn `n` is the user's last and answers
/// stand between the turns.
inline std::vector<Message> all_words(const std::vector<Message>& messages, size_t n) {
  std::vector<const Message*> asked;
  for (const Message& message : messages) {
    if (message.role == "user") asked.push_back(&message);
  }
  const bool is_last = !asked.empty() && asked.back() == &messages[n];
  if (!is_last || asked.size() == static_cast<size_t>(asked.back() - asked.front()) + 1) return {};
  std::vector<Message> found;
  for (const char* between : {"\n", ""}) {
    if (std::optional<std::string> text = joined_texts(asked, between)) {
      found.push_back(Message::user(std::move(*text)));
    }
  }
  for (size_t i = 0, plain = found.size(); i < plain; ++i) {
    if (std::optional<Message> letters = in_plain_letters(found[i])) found.push_back(std::move(*letters));
  }
  return found;
}

/// The messages without the pixels of their pictures and videos. These are encoded already, and each reading copies
/// its turn.
inline std::vector<Message> without_pixels(const std::vector<Message>& messages) {
  std::vector<Message> same;
  for (const Message& message : messages) {
    Message& turn = same.emplace_back(Message{message.role, {}, message.trusted});
    for (const Part& part : message.parts) {
      if (const auto* text = std::get_if<std::string>(&part)) {
        turn.parts.emplace_back(*text);
      } else if (const auto* video = std::get_if<VideoPart>(&part)) {
        turn.parts.emplace_back(VideoPart{std::vector<ImageLike>(video->frames.size()), video->seconds});
      } else {
        turn.parts.emplace_back(ImageLike());
      }
    }
  }
  return same;
}

/// Hands the other readings of turn `n` to `read` until it returns false; last, if wanted, several texts and turns, and
/// pieces; see `with_each_picture`. `plain`: `in_plain_letters` of judged turns.
template <class Read>
void for_each_reading(const std::vector<Message>& messages, const std::vector<std::optional<Message>>& plain, size_t n,
                      bool pieces, const Read& read) {
  const Message& turn = messages[n];
  std::vector<size_t> begins = {0};  // of a turn's pictures
  std::vector<Part> shown;
  for (size_t i = 0; i <= n; ++i) {
    for (Part& part : shown_in(messages[i])) shown.push_back(std::move(part));
    begins.push_back(shown.size());
  }
  const auto by_itself = [&](const Message& last, size_t turns = 1, bool piece = false) {
    return Reading{{last}, {begins[n + 1 - turns], shown.size()}, true, true, piece};
  };
  const auto in_place = [&](const Message& last, size_t turns = 1, bool piece = false) {
    const size_t before = n + 1 - turns;
    std::vector<Message> all(messages.begin(), messages.begin() + static_cast<std::ptrdiff_t>(before));
    for (size_t i = 0; i < before; ++i) {
      if (plain[i]) all[i].parts = plain[i]->parts;
    }
    all.push_back({"user", last.parts});
    return Reading{std::move(all), {0, shown.size()}, true, true, piece, 1};
  };
  const auto end = plain.begin() + static_cast<std::ptrdiff_t>(n) + 1;
  const bool obfuscated = std::any_of(plain.begin(), end, [](const auto& letters) { return letters.has_value(); });
  if (n > 0 && turn.role == "user") {  // what stands first is read alike where it stands
    Reading alone = by_itself(turn);
    alone.if_safe = alone.stops = false;
    read(alone);
  }
  if (plain[n]) {
    Reading letters = by_itself(*plain[n]);
    letters.if_safe = false;
    read(letters);
  }
  if (n > 0 && obfuscated && !read(in_place(plain[n] ? *plain[n] : turn))) return;
  if (!pieces) return;
  const auto both = [&](const Message& last, size_t turns, bool piece) {
    return read(by_itself(last, turns, piece)) && (turns > n || read(in_place(last, turns, piece)));
  };
  std::vector<Whole> wholes = as_one(messages, n);
  for (size_t i = 0, joined = wholes.size(); i < joined; ++i) {
    if (std::optional<Message> letters = in_plain_letters(wholes[i].turn)) {
      wholes.push_back({std::move(*letters), wholes[i].turns});
    }
  }
  for (const Whole& one : wholes) {
    if (!both(one.turn, one.turns, false)) return;
  }
  if (plain[n]) wholes.insert(wholes.begin(), {*plain[n], 1});
  wholes.insert(wholes.begin(), {turn, 1});
  for (const Whole& whole : wholes) {
    for (const Piece& piece : cut(whole.turn)) {
      if (!both(piece.turn, whole.turns, piece.is_part)) return;
    }
  }
  for (const Message& one : all_words(messages, n)) {
    if (!read(Reading{{one}, {}, true, true, true})) return;
    for (const Piece& piece : cut(one)) {
      if (!read(Reading{{piece.turn}, {}, true, true, true})) return;
    }
  }
}

/// Hands the words of each user's turn with each picture that was shown so far, if these are several, to `read`, with
/// the turn's number. One picture after the other: what begins alike is computed once.
template <class Read>
void with_each_picture(const std::vector<Message>& messages, const std::vector<std::optional<Message>>& plain,
                       const Read& read) {
  std::vector<std::pair<size_t, Part>> shown;
  for (size_t n = 0; n < messages.size(); ++n) {
    for (Part& part : shown_in(messages[n])) shown.emplace_back(n, std::move(part));
  }
  for (size_t i = 0; i < shown.size(); ++i) {
    for (size_t n = shown[i].first; n < messages.size(); ++n) {
      const bool several = shown.size() > 1 && shown[1].first <= n;
      if (messages[n].role != "user" || !several) continue;
      for (const Message* words : {&messages[n], plain[n] ? &*plain[n] : nullptr}) {
        const std::string text = words ? text_of(*words) : "";
        if (!text.empty()) read(n, Reading{{user_turn({shown[i].second}, text)}, {i, i + 1}, true, true, true});
      }
    }
  }
}

/// Hands the readings of `text`, an answer to a dialogue, to `read` until it returns false. A `steered` one stands in
/// place of the last turn's words.
template <class Read>
void for_each_reading_of_answer(const std::vector<Message>& messages, const std::string& text, bool steered,
                                const Read& read) {
  std::vector<std::string> said = {text};
  if (std::string plain = deobfuscated(text); plain != text) said.push_back(std::move(plain));
  const size_t wholes = said.size();
  std::set<std::string> complete(said.begin(), said.end()), known = complete;
  for (size_t i = 0; i < wholes; ++i) {
    complete.insert(in_single_blanks(said[i]));
    for (std::string& piece : pieces(said[i])) {
      if (known.insert(piece).second) said.push_back(std::move(piece));
    }
  }
  std::vector<std::vector<Message>> contexts = {messages, messages};
  bool obfuscated = false;
  size_t shown = 0;
  for (Message& message : contexts[1]) {
    shown += shown_in(message).size();
    if (std::optional<Message> letters = in_plain_letters(message)) {
      message.parts = std::move(letters->parts);
      obfuscated = true;
    }
  }
  if (!obfuscated) contexts.pop_back();
  for (const std::string& one : said) {
    const bool piece = complete.count(one) == 0;
    if (!read(Reading{{Message::user(one)}, {}, false, false, piece})) return;
    int prefix = 0;
    for (std::vector<Message> turns : contexts) {
      steered ? void(turns.back() = user_turn(shown_in(turns.back()), one)) : turns.push_back(Message::user(one));
      ++prefix;
      if (turns.size() == 1 && shown == 0) continue;  // it is by itself
      if (!read(Reading{std::move(turns), {0, shown}, false, false, piece, prefix})) return;
    }
  }
}

/// What a prompt shows, by picture and video. `record`: of a request whose prompt is encoded.
inline std::vector<std::vector<Seen>> by_picture(const Record& record) {
  std::vector<std::vector<Seen>> found;
  if (record.seen.empty()) return found;  // it was given as token ids
  for (const auto* seen : {&record.earlier.back(), &record.seen.back()}) {
    for (const Seen& one : *seen) {
      if (one.row == 0) found.emplace_back();
      found.back().push_back(one);
    }
  }
  return found;
}

/// The pictures of numbers `which`.
inline std::vector<Seen> only(const std::vector<std::vector<Seen>>& pictures, const Span& which) {
  std::vector<Seen> seen;
  for (size_t i = which.first; i < which.second; ++i) seen.insert(seen.end(), pictures[i].begin(), pictures[i].end());
  return seen;
}

/// What a reading's messages say and show: two with the same key have the same score. `seen`: its pictures and videos
/// as the dialogue has them. They count by their pixels and by how they are encoded, not by their files' names.
inline ReadingKey reading_key(const std::vector<Message>& messages, const std::vector<Seen>& seen) {
  Sha256 key;
  const auto add = [&](const std::string& item) {
    const std::string size = std::to_string(item.size()) + " ";
    key.add(size.data(), size.size());
    key.add(item.data(), item.size());
  };
  for (const Message& message : messages) {
    add("role " + message.role);
    for (const Part& part : message.parts) {
      if (const auto* text = std::get_if<std::string>(&part)) {
        add("text " + *text);
      } else if (const auto* video = std::get_if<VideoPart>(&part)) {
        const auto* bytes = reinterpret_cast<const char*>(video->seconds.data());
        add("video " + std::to_string(video->frames.size()) + " " +
            std::string(bytes, bytes + video->seconds.size() * sizeof(double)));
      } else {
        add("image");
      }
    }
  }
  for (const Seen& one : seen) add("seen " + one.key);
  return key.hex();
}

/// Asks a package's prober. What it is given must outlive it.
class Judge {
 public:
  /// Makes a request that gives no answer, and starts from what the conversation keeps.
  using Ask = std::function<Request(EncodedPrompt, Stats&, Conversation&)>;

  Judge(const PromptEncoder& encoder, Ask ask, int split_layer, const Log& log)
      : encoder_(encoder), ask_(std::move(ask)), split_layer_(split_layer), log_(log) {}

  /// The verdict on the prompt of `request`, noted in `record`, which has its messages and what they show.
  /// `conversation` knows the scores of other readings of its turns: those cost nothing again.
  Verdict prompt(Request& request, Record& record, const GatePolicy& policy, Conversation* conversation) const {
    Verdict verdict = request.prefill_lower(policy);
    const Clock clock;
    const std::vector<Message> messages = without_pixels(record.messages);
    record.scores = request.scores;
    std::map<ReadingKey, double> known;
    if (verdict.p_unsafe) {
      std::vector<std::optional<Message>> plain;
      for (size_t n = 0; n < messages.size(); ++n) {
        plain.push_back(is_judged(messages, n) ? in_plain_letters(messages[n]) : std::nullopt);
      }
      double p_unsafe = *verdict.p_unsafe;
      const auto before_the_last = record.scores.end() - (record.scores.empty() ? 0 : 1);
      bool stops = policy.checks_steering() && !std::all_of(record.scores.begin(), before_the_last, [&](double p) {
        return is_safe(p, policy.threshold);
      });
      const std::vector<std::vector<Seen>> pictures = by_picture(record);
      std::map<int, Conversation> scratch;
      const auto consider = [&](double& score, const Reading& reading) {
        if (reading.if_safe && !is_safe(score, policy.threshold)) return false;
        const std::vector<Seen> seen = only(pictures, reading.pictures);
        ReadingKey key = reading_key(reading.messages, seen);
        std::optional<double> p = find(known, key);
        if (!p && conversation) p = find(conversation->read, key);
        if (!p) p = this->read(reading.messages, seen, policy, scratch[reading.prefix]);
        if (!std::isnan(*p)) known.emplace(std::move(key), *p);  // a failure may pass
        if (reading.piece) p = weighed(*p);
        score = worse(score, *p);
        p_unsafe = worse(p_unsafe, *p);
        stops = (reading.stops && !is_safe(*p, policy.threshold)) || stops;
        return true;
      };
      std::map<size_t, size_t> places;  // of judged turns, among these
      for (size_t n = 0; n < messages.size(); ++n) {
        if (is_judged(messages, n)) places.emplace(n, places.size());
      }
      for (const auto& [n, at] : places) {
        double& score = record.scores.at(at);
        const auto read = [&](const Reading& reading) { return consider(score, reading); };
        for_each_reading(messages, plain, n, policy.pieces, read);
      }
      if (policy.pieces) {
        with_each_picture(messages, plain, [&](size_t n, const Reading& reading) {
          consider(record.scores.at(places.at(n)), reading);
        });
      }
      verdict = decide(p_unsafe, stops ? without_steering(policy) : policy, split_layer_);
      record.stats.gate_ms += clock.ms();
    }
    if (conversation) conversation->read = std::move(known);
    record.verdict = verdict;
    return verdict;
  }

  /// The worst p_unsafe of `text`, an answer to the prompt that is noted in `record` with its verdict, until a reading
  /// is unsafe; NaN if one cannot be read.
  double answer(const std::string& text, const Record& record, const GatePolicy& policy) const {
    const std::vector<std::vector<Seen>> pictures = by_picture(record);
    const bool steered = record.verdict && record.verdict->action == Action::steer;
    double p_unsafe = 0.0;
    std::map<int, Conversation> scratch;
    const std::vector<Message> messages = without_pixels(record.messages);
    for_each_reading_of_answer(messages, text, steered, [&](const Reading& reading) {
      double p = this->read(reading.messages, only(pictures, reading.pictures), policy, scratch[reading.prefix]);
      if (reading.piece) p = weighed(p);
      const bool shows = reading.pictures.first < reading.pictures.second;
      if (reading.prefix && !shows) p = weighed(p);  // what is said about no picture says most of it by itself
      p_unsafe = worse(p_unsafe, p);
      return is_safe(p_unsafe, policy.threshold);
    });
    return p_unsafe;
  }

 private:
  /// p_unsafe of the last of `messages`, with the dialogue's pictures and videos as `seen` has them; NaN if it cannot
  /// be read. `scratch` has what the reading before computed.
  double read(const std::vector<Message>& messages, const std::vector<Seen>& seen, const GatePolicy& policy,
              Conversation& scratch) const {
    Stats stats;
    try {
      Request request = ask_(encoder_.prepare_seen(messages, seen, stats), stats, scratch);
      request.prefill_lower(policy);
      scratch.keep_prefix(request.cached_prefix());
      return request.scores.back();
    } catch (const InputError& err) {
      const std::string reason = err.what();
      if (log_) log_("a text could not be judged, so it counts as unsafe: " + reason);
      return std::nan("");
    }
  }

  static std::optional<double> find(const std::map<ReadingKey, double>& scores, const ReadingKey& reading) {
    const auto found = scores.find(reading);
    return found == scores.end() ? std::nullopt : std::optional(found->second);
  }

  const PromptEncoder& encoder_;
  const Ask ask_;
  const int split_layer_;
  const Log& log_;
};

}  // namespace autosteer
