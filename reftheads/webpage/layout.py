"""What a page looks like, and what its buttons do: components of Gradio around a `Session`."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from reftheads.webpage.session import STRONGEST, Session

if TYPE_CHECKING:
    import gradio as gr

TITLE = "reftheads"
CSS = """
.gradio-container {max-width: 1500px !important; margin: auto}
footer {display: none !important}
#title {padding: 0} #title h1 {margin: 0; font-size: 1.4rem} #title p {margin: 0; opacity: .7}
#notice, #training {min-height: 1.7rem; padding: 0 .2rem} .bad {color: #c2410c} progress {width: 100%}
#edited {border-color: #f97316}
#table textarea {font-family: ui-monospace, monospace; font-size: .75rem; white-space: pre; overflow-x: auto}
.node {align-items: center; flex-wrap: nowrap} .adapter {padding: 0; font-weight: 600}
"""
# nothing is loaded from elsewhere, whatever a component of Gradio would like to
HEAD = """<meta http-equiv="Content-Security-Policy"
 content="default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; base-uri 'self'">"""

_ASKING: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "asking"}
_TRAINING: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "training"}
_Listen = Callable[..., Any]


def build(new_session: Callable[[], Session]) -> gr.Blocks:
    """Return a page that is not served yet.

    Args:
        new_session: makes what a visitor works with; called for each who comes, and again when the page is reloaded.
    """
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        session = gr.State(None, time_to_live=6 * 3600)
        changes = gr.State(0)  # of adapters, each of which has nodes of its own
        gr.HTML(
            f"<h1>{TITLE}</h1><p>One model, asked twice: as it is, and with the nodes of its graph.</p>",
            elem_id="title",
        )
        with gr.Row():
            with gr.Column(scale=3):
                _chat(session)
            with gr.Column(scale=2, min_width=400):
                adapters = _adapters(session, changes)
                demonstrations = _training(session)
        with gr.Accordion("Node table", open=False):
            table = gr.Textbox(show_label=False, container=False, lines=3, max_lines=20, elem_id="table")

        def enter() -> tuple[Any, ...]:
            new = new_session()
            return new, 1, _choices(new), _pairs(new)

        _on(blocks.load, enter, None, [session, changes, adapters, demonstrations])
        _on(changes.change, lambda session: session.table(), session, table)
    return blocks


def _on(listen: _Listen, act: Callable[..., Any], inputs: Any, outputs: Any, **options: Any) -> None:
    """Let something happen at an event of a component, for the page alone and without a spinner."""
    listen(act, inputs, outputs, api_visibility="private", show_progress="hidden", **options)


# --- questions --------------------------------------------------------------------------------------------


def _chat(session: gr.State) -> None:
    import gradio as gr

    look: dict[str, Any] = {"render_markdown": False, "buttons": ["copy"], "height": 460, "allow_file_downloads": False}
    with gr.Row():
        base = gr.Chatbot(label="base model", elem_id="base", min_width=260, **look)
        edited = gr.Chatbot(label="with the graph", elem_id="edited", min_width=260, **look)
    notice = gr.HTML(elem_id="notice")
    with gr.Row():
        question = gr.Textbox(
            placeholder="Ask both …", show_label=False, container=False, scale=6, lines=1, max_lines=6, elem_id="question"
        )
        send = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
        anew = gr.Button("New chat", elem_id="anew", min_width=80)

    def ask(session: Session, said: str) -> Iterator[tuple[Any, ...]]:
        before = session.conversations
        try:
            for answers in session.answer(said):
                turns = [[{"role": "user", "content": said}, {"role": "assistant", "content": a}] for a in answers]
                yield [*before[0], *turns[0]], [*before[1], *turns[1]], "", ""
        except ValueError as error:
            yield gr.skip(), gr.skip(), _bad(error), gr.skip()

    def forget(session: Session) -> tuple[Any, ...]:
        return ([], [], "") if (problem := _tried(session.forget)) is None else (gr.skip(), gr.skip(), problem)

    for listen in (question.submit, send.click):
        _on(listen, ask, [session, question], [base, edited, notice, question], **_ASKING)
    _on(anew.click, forget, session, [base, edited, notice])


# --- adapters and nodes -----------------------------------------------------------------------------------


def _adapters(session: gr.State, changes: gr.State) -> gr.CheckboxGroup:
    import gradio as gr

    with gr.Group():
        chosen = gr.CheckboxGroup(label="Adapters that act, in this order", elem_id="adapters")
        with gr.Row():
            name = gr.Textbox(placeholder="a name", show_label=False, container=False, scale=3, elem_id="name")
            save = gr.Button("Save", elem_id="save", min_width=80)
    notice = gr.HTML(elem_id="saved", padding=False)

    @gr.render(session, changes.change, show_progress="hidden")
    def nodes(session: Session) -> None:
        of = ""
        for (adapter, node), dial in session.dials.items():
            if adapter != of and len(session.chosen) > 1:
                gr.HTML(html.escape(adapter), elem_classes="adapter")
            of, turn = adapter, partial(session.turn, adapter, node)
            with gr.Row(elem_classes="node"):
                on = gr.Checkbox(dial.on, label=node, container=False, scale=2, min_width=90)
                strength = gr.Slider(
                    0, STRONGEST, dial.strength, step=0.05, label=f"strength of {node}", scale=3, min_width=160
                )
            _on(on.input, lambda on, turn=turn: _tried(turn, on=on) or "", on, notice)
            _on(
                strength.input, lambda strength, turn=turn: _tried(turn, strength=strength) or "", strength, notice,
                trigger_mode="always_last",
            )  # fmt: skip

    def choose(session: Session, names: list[str], count: int) -> tuple[Any, ...]:
        return _choices(session), _tried(session.choose, names) or "", count + 1

    def keep(session: Session, name: str) -> tuple[Any, ...]:
        problem = _tried(session.save, name)
        return _choices(session), problem or f"saved as {html.escape(name)}"

    _on(chosen.input, choose, [session, chosen, changes], [chosen, notice, changes])
    _on(save.click, keep, [session, name], [chosen, notice])
    return chosen


def _choices(session: Session) -> Any:
    import gradio as gr

    return gr.update(choices=session.adapters, value=session.chosen)


# --- training ---------------------------------------------------------------------------------------------


def _training(session: gr.State) -> gr.Dataframe:
    import gradio as gr

    with gr.Accordion("Demonstrations", open=True):
        pairs = gr.Dataframe(
            headers=["question", "answer"], datatype="str", interactive=False, show_label=False, max_height=190,
            wrap=True, elem_id="demonstrations",
        )  # fmt: skip
        with gr.Row():
            question = gr.Textbox(placeholder="question", show_label=False, container=False, elem_id="shown-question")
            answer = gr.Textbox(placeholder="its answer", show_label=False, container=False, elem_id="shown-answer")
        with gr.Row():
            add = gr.Button("Add", elem_id="add", min_width=80)
            train = gr.Button("Retrain", variant="primary", elem_id="retrain", min_width=80)
        progress = gr.HTML(elem_id="training")

    def demonstrate(session: Session, asked: str, answered: str) -> tuple[Any, ...]:
        problem = _tried(session.demonstrate, asked, answered)
        return (gr.skip(), gr.skip(), gr.skip(), problem) if problem else (_pairs(session), "", "", "")

    def retrain(session: Session) -> Iterator[str]:
        began, steps = time.perf_counter(), session.steps
        try:
            for step in session.retrain():
                yield f'<progress value="{step}" max="{steps}"></progress>'
        except (ValueError, FloatingPointError) as error:
            yield _bad(error)
        else:
            names = " and ".join(map(html.escape, session.chosen))
            count, seconds = len(session.demonstrations), time.perf_counter() - began
            yield f"{names}: trained on {count} demonstrations in {seconds:.1f} s, for you alone"

    _on(add.click, demonstrate, [session, question, answer], [pairs, question, answer, progress])
    _on(train.click, retrain, session, progress, **_TRAINING)
    return pairs


def _pairs(session: Session) -> list[list[str]]:
    return [list(pair) for pair in session.demonstrations]


# --- messages ---------------------------------------------------------------------------------------------


def _tried(act: Callable[..., None], *args: Any, **kwargs: Any) -> str | None:
    """Do something, and return what went wrong, to be shown."""
    try:
        act(*args, **kwargs)
    except ValueError as error:
        return _bad(error)
    return None


def _bad(error: Exception) -> str:
    text = str(error)
    return f'<span class="bad">{html.escape(text[:1].upper() + text[1:])}</span>'
