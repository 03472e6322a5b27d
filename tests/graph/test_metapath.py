"""Meta-paths: what is read, and what is refused at which step."""

import pytest

from core.config import UserError
from graph.metapath import Link, MetaPath, Step, links_from, parse

PAPERS = ('author', 'paper', 'venue')
WRITTEN = (Link('paper-author', 'paper', 'author', 9), Link('paper-venue', 'paper', 'venue', 3))
PACKAGES = ('package', 'maintainer', 'tag', 'sub-tag', 'sub')
DEBIAN = (Link('depends', 'package', 'package', 7), Link('suggests', 'package', 'package', 5),
          Link('by', 'package', 'maintainer', 4), Link('has', 'package', 'tag', 4),
          Link('once had', 'package', 'tag', 2, True), Link('under', 'sub-tag', 'tag', 2),
          Link('of', 'sub', 'package', 2))


def steps(text, types=PACKAGES, links=DEBIAN):
  return [(links[step.relation].name, step.direction) for step in parse(text, types, links).steps]


@pytest.mark.parametrize('text', ['APVPA', 'apvpa', 'author-paper-venue-paper-author'])
def test_the_paper_s_path(text):
  path = parse(text, PAPERS, WRITTEN)
  assert path == MetaPath(text, ('author', 'paper', 'venue', 'paper', 'author'),
                          (Step(0, '<'), Step(1, '>'), Step(1, '<'), Step(0, '>')))
  assert path.cyclic
  # A P V P A P V P A: the shared end is there once.
  assert ''.join(path.type_at(i)[0] for i in range(10)) == 'apvpapvpap'
  assert [path.steps[i % 4].direction for i in range(6)] == ['<', '>', '<', '>', '<', '>']


@pytest.mark.parametrize('text, found', [
    ('package-maintainer-package', [('by', '>'), ('by', '<')]),
    ('package-[depends]-package', [('depends', '-')]),
    ('package-[depends]->package', [('depends', '>')]),
    ('package<-[depends]-package', [('depends', '<')]),
    ('package-[depends]->package<-[suggests]-package', [('depends', '>'), ('suggests', '<')]),
    ('tag<-[once had]-package-[has]->tag', [('once had', '<'), ('has', '>')]),
    ('package->maintainer<-package', [('by', '>'), ('by', '<')]),
    ('maintainer-package-sub-package', [('by', '<'), ('of', '<'), ('of', '>')])])
def test_relations_and_directions(text, found):
  assert steps(text) == found


@pytest.mark.parametrize('text, types', [
    ('tag-sub-tag-tag', ('tag', 'sub-tag', 'tag')),
    ('sub-package-sub', ('sub', 'package', 'sub')),
    ('sub-tag-[under]->tag', ('sub-tag', 'tag')),
    ('sub-tag->tag<-sub-tag', ('sub-tag', 'tag', 'sub-tag'))])
def test_types_with_a_dash_in_their_names(text, types):
  assert parse(text, PACKAGES, DEBIAN).types == types


def test_a_type_ends_where_its_name_ends():
  """'paper-a' is a type here, and 'paper-author' are two."""
  links = (*WRITTEN, Link('copy', 'paper-a', 'author', 2))
  types = (*PAPERS, 'paper-a')
  assert parse('author-paper-author', types, links).types == ('author', 'paper', 'author')
  assert parse('author-paper-a-author', types, links).types == ('author', 'paper-a', 'author')


def test_any_edge():
  path = parse('*', PAPERS, WRITTEN)
  assert (path.types, path.steps, path.cyclic) == ((), (Step(-1, '-'),), True)
  assert path.positions(3, ()) == [0, 1, 2] and path.type_at(7) == ''
  with pytest.raises(UserError, match=r"keep=\['paper'\] needs a meta-path"):
    path.positions(3, ('paper',))


@pytest.mark.parametrize('text, types, links, words', [
    ('', PAPERS, WRITTEN, r"metapath='' is empty; a meta-path .* such as paper-author-paper"),
    ('A', PAPERS, WRITTEN, "metapath='A' is one node"),
    ('paper', PAPERS, WRITTEN, "metapath='paper' is one node"),
    ('APX', PAPERS, WRITTEN, "'X': no type begins with it; types: author, paper, venue"),
    ('ABA', ('author', 'area', 'book'), WRITTEN, "'A': 2 types begin with it"),
    ('author-papers-author', PAPERS, WRITTEN, "no type 'papers'; types: author, paper, venue"),
    ('author-term', PAPERS, WRITTEN, "no type 'term'"),
    ('APVA', PAPERS, WRITTEN, "step 3: no relation joins 'venue' to 'author'; relations: "
                              r'paper-\[paper-author\]->author, paper-\[paper-venue\]->venue'),
    ('paper-author->paper', PAPERS, WRITTEN,
     "step 2: no relation joins 'author' to 'paper' in that direction"),
    ('paper-[paper-venue]-author', PAPERS, WRITTEN,
     "step 1: 'paper-venue' does not join 'paper' to 'author'"),
    ('paper-[wrote]-author', PAPERS, WRITTEN, "step 1: there is no relation 'wrote'"),
    ('tag-package-maintainer', PACKAGES, DEBIAN,
     r"step 1: several relations join 'tag' to 'package'; name one: tag-\[has\]-package, "
     r'tag-\[once had\]-package'),
    ('maintainer-package-package', PACKAGES, DEBIAN, 'step 2: several relations'),
    ('author-', PAPERS, WRITTEN, "a type should follow 'author-'"),
    ('-author', PAPERS, WRITTEN, "a type should follow ''"),
    ('author--paper', PAPERS, WRITTEN, "a type should follow 'author-'"),
    ('author<->paper', PAPERS, WRITTEN, "should follow 'author'"),
    ('author-[paper', PAPERS, WRITTEN, "a type should follow 'author-'"),
    ('author-[paper-author]paper', PAPERS, WRITTEN, "a type should follow 'author-'")])
def test_what_is_no_path(text, types, links, words):
  with pytest.raises(UserError, match=words) as error:
    parse(text, types, links)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('keep, length, found', [
    ((), 6, [0, 1, 2, 3, 4, 5]), (('author', 'venue'), 5, [0, 2, 4, 6, 8]),
    (('venue',), 3, [2, 6, 10]), (('paper',), 4, [1, 3, 5, 7]), (('author',), 1, [0])])
def test_positions_of_what_is_kept(keep, length, found):
  assert parse('APVPA', PAPERS, WRITTEN).positions(length, keep) == found


def test_a_path_that_is_no_circle_has_as_many_tokens_as_types():
  path = parse('APV', PAPERS, WRITTEN)
  assert not path.cyclic
  assert path.positions(3, ()) == [0, 1, 2]
  assert path.positions(2, ('author', 'venue')) == [0, 2]
  with pytest.raises(UserError, match="length=4: the meta-path 'APV' begins with 'author' and ends "
                                      "with 'venue', so it cannot be repeated, and has 3 tokens"):
    path.positions(4, ())
  with pytest.raises(UserError, match='has 2 tokens'):
    path.positions(3, ('author', 'venue'))
  with pytest.raises(UserError, match="keep: 'venues' is not on the meta-path 'APV'; it has"):
    path.positions(2, ('venues',))


def test_links_of_a_graph_that_is_not_here():
  nodes = {'author': 4, 'paper': 6, 'venue': 2}
  links = links_from(nodes, [('paper', 'author', 9), ('paper', 'venue', 3)])
  assert links == WRITTEN
  with pytest.raises(UserError, match="edges: 'term' is not in config.model.nodes, which has auth"):
    links_from(nodes, [('paper', 'term', 9)])
