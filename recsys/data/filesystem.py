"""Former place of `recsys.storage.files` and `recsys.storage.location`."""

from recsys.storage.files import home_expanded as home_expanded
from recsys.storage.files import link_or_copy as link_or_copy
from recsys.storage.files import read_json as read_json
from recsys.storage.files import recover_folder as recover_folder
from recsys.storage.files import regular_file as regular_file
from recsys.storage.files import replace_folder as replace_folder
from recsys.storage.files import whole_file as whole_file
from recsys.storage.files import whole_folder as whole_folder
from recsys.storage.files import write_whole as write_whole
from recsys.storage.location import Location as Location
from recsys.storage.location import is_partition as is_partition
