"""What a page looks like, and what its buttons do: components of Gradio around a `Session`."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from reftheads.webpage.session import STRONGEST, Dial, Session

if TYPE_CHECKING:
    import gradio as gr

TITLE = "reftheads"
CSS = """
.gradio-container, .gradio-container main {max-width: 1500px !important; width: 100%; margin: auto}
.gradio-container main {padding: .8rem 1.2rem !important}
footer {display: none !important}
#title {padding: 0} #title h1 {margin: 0; font-size: 1.4rem} #title p {margin: 0; opacity: .7}
#notice, #acting, #training {min-height: 1.6rem} .bad {color: #c2410c} progress {width: 100%}
#edited {border: 2px solid #f97316}
#table textarea {font-family: ui-monospace, monospace; font-size: .75rem; white-space: pre; overflow-x: auto}
#dials {max-height: 19rem; overflow-y: auto; gap: .4rem}
.node {align-items: center; flex-wrap: nowrap; background: var(--block-background-fill); padding: .3rem .8rem}
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
        with gr.Accordion("Node table", open=False, elem_id="nodes"):
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

    look: dict[str, Any] = {"render_markdown": False, "buttons": [], "height": 480, "min_width": 260}
    with gr.Row():
        base = gr.Chatbot(label="base model", elem_id="base", **look)
        edited = gr.Chatbot(label="with the graph", elem_id="edited", **look)
    notice = gr.HTML(elem_id="notice")
    with gr.Row():
        question = gr.Textbox(
            placeholder="Ask both …",
            show_label=False,
            container=False,
            scale=6,
            lines=1,
            max_lines=6,
            elem_id="question",
        )
        send = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
        anew = gr.Button("New chat", elem_id="anew", min_width=80)

    def ask(session: Session, said: str) -> Iterator[tuple[Any, ...]]:
        before = [[(turn["role"], turn["content"]) for turn in turns] for turns in session.conversations]
        began = time.perf_counter()
        try:
            for answers in session.answer(said):
                turns = [[("user", said), ("assistant", answer)] for answer in answers]
                yield *(_bubbles(old, new) for old, new in zip(before, turns, strict=True)), "", ""
        except ValueError as error:
            yield gr.skip(), gr.skip(), _bad(error), gr.skip()
        else:
            done = f"Question {len(before[0]) // 2 + 1}: answered in {time.perf_counter() - began:.1f} s"
            yield gr.skip(), gr.skip(), done, gr.skip()

    def forget(session: Session) -> tuple[Any, ...]:
        return ([], [], "") if (problem := _tried(session.forget)) is None else (gr.skip(), gr.skip(), problem)

    for listen in (question.submit, send.click):
        _on(listen, ask, [session, question], [base, edited, notice, question], **_ASKING)
    for listen in (anew.click, base.clear, edited.clear):
        _on(listen, forget, session, [base, edited, notice])


def _bubbles(*turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Return what a `Chatbot` shows. It takes tags for HTML even where it renders no Markdown, so they are escaped."""
    return [{"role": role, "content": html.escape(text)} for role, text in chain(*turns)]


# --- adapters and nodes -----------------------------------------------------------------------------------


def _adapters(session: gr.State, changes: gr.State) -> gr.CheckboxGroup:
    import gradio as gr

    with gr.Group():
        chosen = gr.CheckboxGroup(label="Adapters that act, in this order", elem_id="adapters")
        with gr.Row():
            name = gr.Textbox(placeholder="a name", show_label=False, container=False, scale=3, elem_id="name")
            save = gr.Button("Save", elem_id="save", min_width=80)
    notice = gr.HTML(elem_id="acting", padding=False)

    @gr.render(session, [changes.change], show_progress="hidden")
    def nodes(session: Session) -> None:
        with gr.Column(elem_id="dials"):
            for (adapter, node), dial in session.dials.items():
                name = node if len(session.chosen) == 1 else f"{adapter}/{node}"
                _dial(name, dial, partial(session.turn, adapter, node), notice)

    def choose(session: Session, names: list[str], count: int) -> tuple[Any, ...]:
        problem = _tried(session.choose, names)
        return _choices(session), problem or f"{html.escape(' and then '.join(session.chosen))} acts", count + 1

    def keep(session: Session, name: str) -> tuple[Any, ...]:
        problem = _tried(session.save, name)
        return _choices(session), problem or f"saved as {html.escape(name)}"

    _on(chosen.input, choose, [session, chosen, changes], [chosen, notice, changes])
    _on(save.click, keep, [session, name], [chosen, notice])
    return chosen


def _dial(name: str, dial: Dial, turn: Callable[..., None], notice: gr.HTML) -> None:
    """Show a node's switch and strength."""
    import gradio as gr

    with gr.Row(elem_classes="node"):
        on = gr.Checkbox(dial.on, label=name, container=False, interactive=True, scale=2, min_width=90)
        strength = gr.Slider(
            0, STRONGEST, dial.strength, step=0.05, label=f"strength of {name}", show_label=False, container=False,
            interactive=True, scale=3, min_width=160,
        )  # fmt: skip

    def switch(on: bool) -> str:
        return _tried(turn, on=on) or f"{html.escape(name)} is {'on' if on else 'off'}"

    def strengthen(strength: float) -> str:
        return _tried(turn, strength=strength) or f"{html.escape(name)} acts at {strength:g}"

    _on(on.input, switch, on, notice)
    _on(strength.input, strengthen, strength, notice, trigger_mode="always_last")


def _choices(session: Session) -> Any:
    import gradio as gr

    return gr.update(choices=session.adapters, value=session.chosen)


# --- training ---------------------------------------------------------------------------------------------


def _training(session: gr.State) -> gr.Dataframe:
    import gradio as gr

    with gr.Accordion("Demonstrations", open=True):
        pairs = gr.Dataframe(
            headers=["question", "answer"], datatype="str", interactive=False, show_label=False, max_height=190,
            wrap=True, buttons=[], column_widths=["60%", "40%"], elem_id="demonstrations",
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
