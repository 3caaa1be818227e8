"""The demo: chat, vote, data, train and adapters in one window. Needs Gradio (`pip install 'lora-dpo[demo]'`).

votes            blind votes, each on the disk before it is acknowledged; win rates from them
pair_store       the pairs that someone collected
starters         prompts of ours to begin with
expectation      what to expect of a run
arena            blind battles of two models
conversation     a conversation with one model, or with two side by side
remembered       conversations that survive a reload
run_state        what a run has told so far
base_choice      which bases there are here, which fit, and how one leaves memory
session          what everyone at the demo shares
downloads        packages and exports that leave it
machine_paths    no folder of this machine in a message
html             pieces of pages, escaped
about            who answers, and the way through the page, in a few words
train_view       how a run is shown
search_view      a search for the best settings, and how it is shown
steering         the run that goes on, steered
in_a_terminal    the same as command lines and recipes
theme            colours; style.css and keys.js, the page's styles and keys
handlers         what every handler of the page does
column_pickers   the columns of an upload, where nobody can tell them
look_through     pairs that disagree with an adapter, one at a time
tab_chat, tab_vote, tab_data, tab_train, tab_adapters
page_head        the head of the page, with the choice of the base
follow           what is new, in every picker
api              the same for scripts
server           Gradio on a socket of ours
app              the page put together, and which requests are let in
"""
