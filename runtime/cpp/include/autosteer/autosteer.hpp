// AutoSteer in C++17: the guarded loop of autosteer.runtime, from the ONNX files and the manifest alone.
//
//     autosteer::Engine engine("package/");
//     const auto answer = engine.generate({autosteer::Message::user("what is shown here?", {"photo.png"})}, {},
//                                         engine.policy(), [](const autosteer::Chunk& chunk) { std::cout << chunk.text;
//                                         });
//
// Headers only. Needs onnxruntime (1.21 or newer), nlohmann/json, Oniguruma, utf8proc, libcrypto, libpng and libjpeg;
// CMakeLists.txt beside this file finds them. docs/embedding.md explains the package and this loop.
//
//     engine.hpp        the loop                         text.hpp       dialogue -> token ids -> text
//     generation.hpp    one answer's buffers             tokenizer.hpp  tokenizer.json
//     conversation.hpp  what turns share                 unicode.hpp    UTF-8
//     gate.hpp          the safety rule                  image.hpp      picture -> pixel_values; features -> rows
//     self_test.hpp     check the gate at load           video.hpp      the same for a video's frames
//     manifest.hpp      autosteer.json                   picture.hpp    PNG, JPEG -> pixels
//     subgraph.hpp      sessions, buffers, KV caches     sampling.hpp   logits -> token
//     pages.hpp         huge pages for the weights       drafting.hpp   speculative decoding
//     errors.hpp        exceptions                       digest.hpp     SHA-256
//     check.hpp         replay the golden prompts (not included here)
//
// Other languages: autosteer.h (C functions), built as libautosteer.
#pragma once

#include "engine.hpp"
