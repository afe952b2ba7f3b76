// The forms in which a prober reads the turns of a dialogue, and an answer that is judged (held_back.hpp). The C++ side
// of runtime/readings.py, which has the table of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "errors.hpp"
#include "obfuscation.hpp"
#include "pieces.hpp"
#include "text.hpp"

namespace autosteer {

/// What a reading begins with: nothing, the turns before, these in plain letters, or one picture. What is computed of
/// it serves all readings with the same.
enum class Prefix { none, dialogue, plain_dialogue, picture };

constexpr size_t kMostWithPictures = 4096;  // readings of words with one picture: they are as many as the product

/// A prompt whose last turn the prober scores.
struct Reading {
  std::vector<Message> messages;
  Span pictures;                 // what they show, by number: the dialogue's pictures and videos, then single frames
  bool skip_if_unsafe = false;   // left out once another form of the turn was unsafe
  bool stop_if_unsafe = false;   // the request is then stopped, not steered
  bool discounted = false;       // its score counts for less; see pieces.hpp
  Prefix prefix = Prefix::none;
};

/// What is read instead of a turn.
struct Form {
  enum class Kind { turn, plain, other };
  Message turn;           // with all that the turns which it stands for show, in front of the words
  size_t stands_for = 1;  // turns, up to the one that is judged
  bool discounted = false;
  Kind kind = Kind::other;
};

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

/// A picture or a video, or a frame of one, and the turn that shows it.
using ShownBy = std::pair<size_t, Part>;

/// The pictures and videos of a dialogue, and the turns that show them.
inline std::vector<ShownBy> shown_by_turn(const std::vector<Message>& messages) {
  std::vector<ShownBy> shown;
  for (size_t n = 0; n < messages.size(); ++n) {
    for (Part& part : shown_in(messages[n])) shown.emplace_back(n, std::move(part));
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

/// The messages, each with what its counterpart in `plain` says, if it has one.
inline std::vector<Message> with_letters_of(const std::vector<std::optional<Message>>& plain,
                                            std::vector<Message> messages) {
  for (size_t i = 0; i < messages.size(); ++i) {
    if (plain[i]) messages[i].parts = plain[i]->parts;
  }
  return messages;
}

/// The texts of some turns as one, joined by line ends, and by nothing; nothing if only one has a word.
inline std::vector<std::string> joined_texts(const std::vector<const Message*>& turns) {
  std::vector<std::string> texts = {"", ""};
  size_t count = 0;
  for (const Message* turn : turns) {
    for (const Part& part : turn->parts) {
      const auto* said = std::get_if<std::string>(&part);
      if (!said || std::all_of(said->begin(), said->end(), is_space)) continue;
      texts[0] += (count++ ? "\n" : "") + *said;
      texts[1] += *said;
    }
  }
  return count > 1 ? texts : std::vector<std::string>();
}

/// The texts of turn `n` as one, if it has several, and those of the user's turns in a row that it ends.
///
/// A request may be spread over them, a word or a letter each, among harmless ones. What a template writes between two
/// texts is its own affair, so they are joined by line ends, and by nothing.
inline std::vector<Form> as_one(const std::vector<Message>& messages, size_t n) {
  size_t row = 1;
  if (messages[n].role == "user" && (n + 1 == messages.size() || messages[n + 1].role != "user")) {
    while (row <= n && messages[n - row].role == "user") ++row;
  }
  std::vector<Form> found;
  for (const size_t count : std::set<size_t>{1, row}) {
    std::vector<const Message*> turns;
    std::vector<Part> shown;
    for (size_t i = n + 1 - count; i <= n; ++i) {
      turns.push_back(&messages[i]);
      for (Part& part : shown_in(messages[i])) shown.push_back(std::move(part));
    }
    for (std::string& text : joined_texts(turns)) found.push_back({user_turn(shown, std::move(text)), count});
  }
  return found;
}

/// All that the user says as one text, and all that the program does not trust, where turn `n` is the last of it and
/// `as_one` has not read it: joined as there, and in plain letters.
inline std::vector<std::string> all_words(const std::vector<Message>& messages, size_t n) {
  std::vector<const Message*> users, untrusted;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role == "user") users.push_back(&messages[i]);
    if (is_judged(messages, i)) untrusted.push_back(&messages[i]);
  }
  const bool in_a_row = users.size() <= n + 1 && (users.empty() || users.front() == &messages[n + 1 - users.size()]) &&
                        (users.empty() || users.back() == &messages[n]);
  std::vector<std::string> texts;
  const auto add = [&](std::string text) {
    if (std::find(texts.begin(), texts.end(), text) == texts.end()) texts.push_back(std::move(text));
  };
  for (const auto& turns : {in_a_row ? std::vector<const Message*>() : users,
                            untrusted == users ? std::vector<const Message*>() : untrusted}) {
    if (turns.empty() || turns.back() != &messages[n]) continue;
    for (std::string& text : joined_texts(turns)) add(std::move(text));
  }
  for (size_t i = 0, plain = texts.size(); i < plain; ++i) add(deobfuscated(texts[i]));
  return texts;
}

/// The pieces of a form's text (pieces.hpp); discounted, unless they have all of its words.
inline std::vector<Form> pieces_in(const Form& whole) {
  const std::vector<Part> shown = shown_in(whole.turn);
  const std::string text = text_of(whole.turn), complete = in_single_blanks(text);
  std::vector<Form> found;
  for (std::string& piece : pieces(text)) {
    const bool is_part = piece != complete;
    found.push_back({user_turn(shown, std::move(piece)), whole.stands_for, is_part});
  }
  return found;
}

/// Turn `n`, its texts as one, the user's turns in a row (both only `with_pieces`); each in plain letters, too.
inline std::vector<Form> whole_forms(const std::vector<Message>& messages,
                                     const std::vector<std::optional<Message>>& plain, size_t n, bool with_pieces) {
  std::vector<Form> found = {{messages[n], 1, false, Form::Kind::turn}};
  if (plain[n]) found.push_back({*plain[n], 1, false, Form::Kind::plain});
  if (!with_pieces) return found;
  std::vector<Form> as_one_text = as_one(messages, n);
  for (size_t i = 0, count = as_one_text.size(); i < count; ++i) {
    if (std::optional<Message> letters = in_plain_letters(as_one_text[i].turn)) {
      as_one_text.push_back({std::move(*letters), as_one_text[i].stands_for});
    }
  }
  std::move(as_one_text.begin(), as_one_text.end(), std::back_inserter(found));
  return found;
}

/// The forms in which turn `n` is read.
inline std::vector<Form> forms(const std::vector<Message>& messages, const std::vector<std::optional<Message>>& plain,
                               size_t n, bool with_pieces) {
  std::vector<Form> found = whole_forms(messages, plain, n, with_pieces);
  if (!with_pieces) return found;
  const size_t wholes = found.size();
  if (messages[n].role != "user" && !text_of(messages[n]).empty()) {
    found.push_back({{"user", messages[n].parts}, n + 1, true});
  }
  for (size_t i = 0; i < wholes; ++i) {
    for (Form& piece : pieces_in(found[i])) found.push_back(std::move(piece));
  }
  for (const std::string& text : all_words(messages, n)) {
    std::vector<std::string> parts = pieces(text);
    if (parts.empty()) parts.push_back(text);
    for (std::string& part : parts) found.push_back({Message::user(std::move(part)), n + 1, true});
  }
  return found;
}

/// `in_plain_letters` of each turn that is judged; nothing for the others.
inline std::vector<std::optional<Message>> plain_turns(const std::vector<Message>& messages) {
  std::vector<std::optional<Message>> plain;
  for (size_t n = 0; n < messages.size(); ++n) {
    plain.push_back(is_judged(messages, n) ? in_plain_letters(messages[n]) : std::nullopt);
  }
  return plain;
}

/// Words, and how many of the dialogue's pictures and videos, up to their turn, a form shows with them.
using WordsShown = std::pair<std::string, size_t>;

/// The words of turn `n`'s forms, and their pieces.
inline std::vector<WordsShown> words_and_pieces(const std::vector<Message>& messages,
                                                const std::vector<std::optional<Message>>& plain, size_t n) {
  std::vector<WordsShown> found;
  std::set<std::string> known;
  for (const Form& form : whole_forms(messages, plain, n, true)) {
    const size_t own = shown_in(form.turn).size();
    const auto add = [&](std::string words) {
      if (known.insert(words).second) found.emplace_back(std::move(words), own);
    };
    const std::string text = text_of(form.turn);
    if (text.empty()) continue;
    add(text);
    for (std::string& piece : pieces(text)) add(std::move(piece));
  }
  return found;
}

/// The words of each judged turn's forms, and their pieces, with each picture and each of `frames`; with
/// `judge_answers`, those of a user with what was shown so far (runtime/readings.py says why). One picture after
/// the other: what begins alike is computed once. Throws InputError for more than kMostWithPictures.
inline std::vector<std::pair<size_t, Reading>> with_each_picture(const std::vector<Message>& messages,
                                                                 const std::vector<std::optional<Message>>& plain,
                                                                 bool judge_answers,
                                                                 const std::vector<ShownBy>& frames) {
  std::vector<ShownBy> shown = shown_by_turn(messages);
  std::vector<std::pair<size_t, Reading>> found;
  if (shown.empty()) return found;
  std::vector<std::vector<WordsShown>> said;  // by turn; nothing of those that are not judged
  std::vector<size_t> shown_up_to;            // a turn, and in it
  for (size_t n = 0; n < messages.size(); ++n) {
    said.push_back(is_judged(messages, n) ? words_and_pieces(messages, plain, n) : std::vector<WordsShown>());
    shown_up_to.push_back((n ? shown_up_to.back() : 0) + shown_in(messages[n]).size());
  }
  shown.insert(shown.end(), frames.begin(), frames.end());
  for (size_t i = 0; i < shown.size(); ++i) {
    const auto& [first, picture] = shown[i];
    for (size_t n = 0; n < messages.size(); ++n) {
      if (judge_answers && messages[n].role == "user" && n < first) continue;
      for (const auto& [words, own] : said[n]) {
        if (own == 1 && i + 1 == shown_up_to[n]) continue;  // read as a form
        if (found.size() == kMostWithPictures) {
          throw InputError(std::to_string(shown.size()) + " pictures and frames with so many words are more than the " +
                           std::to_string(kMostWithPictures) + " readings that the gate makes of them: show fewer, " +
                           "say less, or give a policy without pieces");
        }
        Reading reading{{user_turn({picture}, words)}, {i, i + 1}, true, true, true, Prefix::picture};
        found.emplace_back(n, std::move(reading));
      }
    }
  }
  return found;
}

/// Hands what is read of a dialogue to `read`, with the number of the turn. Not the turns where they stand, nor these
/// in plain letters: each of the two is one prompt, which gives the scores of all turns (judge.hpp). `plain`:
/// `plain_turns`. `with_pieces`: also what is below "the turn in plain letters" in the table of runtime/readings.py.
/// `judge_answers`: whether the answer will be judged. `frames`: of the videos, each as a video of its own. Throws as
/// `with_each_picture` does, before the first.
template <class Read>
void for_each_reading(const std::vector<Message>& messages, const std::vector<std::optional<Message>>& plain,
                      bool with_pieces, bool judge_answers, const std::vector<ShownBy>& frames, const Read& read) {
  std::vector<std::pair<size_t, Reading>> with_pictures;
  if (with_pieces) with_pictures = with_each_picture(messages, plain, judge_answers, frames);
  std::vector<size_t> shown_up_to;  // a turn, and in it
  for (const Message& message : messages) {
    shown_up_to.push_back((shown_up_to.empty() ? 0 : shown_up_to.back()) + shown_in(message).size());
  }
  for (size_t n = 0; n < messages.size(); ++n) {
    if (!is_judged(messages, n)) continue;
    for (const Form& form : forms(messages, plain, n, with_pieces)) {
      const bool is_turn = form.kind == Form::Kind::turn, always = form.kind != Form::Kind::other;
      if (!is_turn || (n > 0 && form.turn.role == "user")) {  // what stands first is read alike where it stands
        const Span own = {shown_up_to[n] - shown_in(form.turn).size(), shown_up_to[n]};
        read(n, Reading{{form.turn}, own, !always, !is_turn, form.discounted});
      }
      if (form.stands_for <= n && !always) {
        const auto end = messages.begin() + static_cast<std::ptrdiff_t>(n + 1 - form.stands_for);
        std::vector<Message> said = with_letters_of(plain, {messages.begin(), end});
        said.push_back({"user", form.turn.parts});
        read(n, Reading{std::move(said), {0, shown_up_to[n]}, true, true, form.discounted, Prefix::plain_dialogue});
      }
    }
  }
  for (const auto& [n, reading] : with_pictures) read(n, reading);
}

/// Hands the readings of `text`, an answer to a dialogue, and of its pieces, to `read` until it returns false; both in
/// plain letters, too. `frames`: of the videos, each as a video of its own.
///
/// Behind a dialogue they are discounted, unless there are pictures: what is said about none says most of it alone. So
/// they are with each picture and frame, and behind the last turn's words about it. A `steered` answer, whose dialogue
/// is unsafe, stands in the place of the last turn's words.
template <class Read>
void for_each_reading_of_answer(std::vector<Message> messages, const std::string& text,
                                const std::vector<ShownBy>& frames, bool steered, const Read& read) {
  if (messages.empty()) messages.push_back({"user", {}});  // the prompt was given as token ids
  std::vector<std::string> said = {text};
  if (std::string letters = deobfuscated(text); letters != text) said.push_back(std::move(letters));
  std::set<std::string> complete(said.begin(), said.end()), known = complete;
  for (size_t i = 0, wholes = said.size(); i < wholes; ++i) {
    complete.insert(in_single_blanks(said[i]));
    for (std::string& piece : pieces(said[i])) {
      if (known.insert(piece).second) said.push_back(std::move(piece));
    }
  }
  std::vector<std::optional<Message>> plain;
  for (const Message& message : messages) plain.push_back(in_plain_letters(message));
  std::vector<ShownBy> shown = shown_by_turn(messages);
  const size_t pictures = shown.size();
  std::vector<std::vector<Message>> contexts = {messages};
  if (std::any_of(plain.begin(), plain.end(), [](const auto& letters) { return letters.has_value(); })) {
    contexts.push_back(with_letters_of(plain, messages));
  }
  for (const std::string& one : said) {
    const bool is_part = complete.count(one) == 0;
    if (!read(Reading{{Message::user(one)}, {}, false, false, is_part})) return;
    Prefix prefix = Prefix::dialogue;
    for (std::vector<Message> turns : contexts) {
      const Prefix own = std::exchange(prefix, Prefix::plain_dialogue);
      steered ? void(turns.back() = user_turn(shown_in(turns.back()), one)) : turns.push_back(Message::user(one));
      if (turns.size() == 1 && pictures == 0) continue;  // it is alone
      if (!read(Reading{std::move(turns), {0, pictures}, false, false, is_part || pictures == 0, own})) return;
    }
  }
  const std::vector<std::string> spread = joined_texts({&messages.back()});
  const std::string asked = spread.empty() ? text_of(contexts.back().back()) : deobfuscated(spread[0]);
  shown.insert(shown.end(), frames.begin(), frames.end());
  for (size_t i = 0; i < shown.size(); ++i) {
    const bool is_prompt = i == 0 && messages.size() == 1 && pictures == 1;  // its words and this picture: above
    const Part& picture = shown[i].second;
    for (const std::string& one : said) {
      if (!(is_prompt && steered)) {
        if (!read(Reading{{user_turn({picture}, one)}, {i, i + 1}, false, false, true, Prefix::picture})) return;
      }
      if (asked.empty() || is_prompt || steered) continue;
      std::vector<Message> turns = {user_turn({picture}, asked), Message::user(one)};
      if (!read(Reading{std::move(turns), {i, i + 1}, false, false, true, Prefix::picture})) return;
    }
  }
}

}  // namespace autosteer
