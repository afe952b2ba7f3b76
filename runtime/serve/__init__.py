"""autosteer-serve: a package behind the HTTP interface that OpenAI's clients speak, with the verdict in every answer.

    cli          options, and the start
    app          routes: a request -> its body (protocol) -> its turn (scheduler) -> chunks or one answer
    protocol     what a body may say; anything else is an error that names the parameter
    dialogue     a body's messages and pictures -> the engine's
    scheduler    some requests compute, some wait, the rest are turned away; which of them pause for a shared pass
    answering    what runs in a turn: the engine, and the caches of earlier turns (conversations)
    chat, responses, moderations   an answer in each endpoint's form
    access, limits, metrics, faults

Needs the extra `serve`. Nothing else in the runtime imports this.
"""
